"""The published training step in PyTorch, and the process in which `run.py` checks and times it.

    python benchmarks/torch_peer/worker.py --folder=DIR --variant=published

DIR holds what `run.py` wrote: `spec.json`, `weights.npz` (upstream's names) and `batch.npz`; the result goes to
`DIR/<variant>.json`. Imports neither JAX nor ktda_jax, whose memory would count.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # where `benchmarks` is, for a start by path

from benchmarks.timing import resident_peak, summary, timed
from benchmarks.torch_peer.model import AUX_LEVEL, KTDA, resize

IGNORE = 255
WARMUP_START = 1e-3  # mmengine's LinearLR start_factor as published
CHECK = "torch_check"
VARIANTS = {  # student passes per step, precision, torch.compile
    "published": (2, "default", False),
    "once": (1, "default", False),
    "tf32": (2, "tf32", False),
    "compiled": (2, "bfloat16", True),
    "compiled_once": (1, "bfloat16", True),
}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, options) -> torch.Tensor:
    """logits (B, C, h, w), labels (B, H, W) int64 with 255 = ignore -> scalar, mmsegmentation's mean."""
    weights = None if options.class_weights is None else logits.new_tensor(options.class_weights)
    reduction = "mean" if options.avg_non_ignore else "sum"
    value = F.cross_entropy(logits, labels, weights, ignore_index=IGNORE, reduction=reduction)
    return value if options.avg_non_ignore else value / labels.numel()


def distillation(student: list[torch.Tensor], teacher: list[torch.Tensor], options) -> torch.Tensor:
    """alpha KL T^2 + (1 - alpha) MSE per level, averaged; softmax along the width. Maps are (B, C, h, w)."""
    total, alpha, temperature = 0.0, options.alpha, options.temperature
    for s, t in zip(student, teacher, strict=True):
        log_s, log_t = (F.log_softmax(x / temperature, dim=-1) for x in (s, t))
        kl = F.kl_div(log_s, log_t, reduction="sum", log_target=True) / len(s)
        total = total + alpha * kl * temperature**2 + (1 - alpha) * F.mse_loss(s, t)
    total = total / len(student)
    return total / 2 if alpha == 0 else total


def loss_terms(model: KTDA, images: torch.Tensor, labels: torch.Tensor, *, options, passes: int) -> dict:
    """images (B, 3, H, W) uint8, labels (B, H, W) int64. `passes` 2 runs the student again for the distillation."""
    x = model.normalize(images)
    with torch.no_grad():
        taps = model.teach_backbone(x)
    aligned = model.align(x)
    pyramid = model.fmm(model.neck(aligned))
    logits = resize(model.decode_head(pyramid), labels.shape[1:])
    aux = resize(model.auxiliary_head(pyramid[AUX_LEVEL]), labels.shape[1:])
    again = model.align(x) if passes == 2 else aligned
    terms = {
        "decode": cross_entropy(logits, labels, options),
        "aux": options.aux_weight * cross_entropy(aux, labels, options),
        "distill": distillation(again, taps, options),
    }
    terms["loss"] = terms["decode"] + terms["aux"] + terms["distill"]
    with torch.no_grad():
        hits = (logits.argmax(1) == labels).sum()  # an ignored pixel is never hit
        terms["acc"] = 100 * hits / (labels != IGNORE).sum()
    return terms


def learning_rate(step: int, options) -> float:
    """Share of the base rate at a step, counted from 0: linear warm-up, then polynomial decay."""
    begin = options.warmup if options.poly_begin is None else options.poly_begin
    rising = WARMUP_START + (1 - WARMUP_START) * min(step / max(options.warmup - 1, 1), 1) if options.warmup else 1.0
    falling = 1 - (step - begin) / max(options.total_steps - begin - 1, 1)
    return rising * min(max(falling, 0.0), 1.0) ** options.power


class Training:
    """The model with its loss, AdamW and learning rate; `step` is one optimiser step."""

    def __init__(self, model: KTDA, spec, *, passes: int, autocast: bool = False, compiled: bool = False):
        self.model = model.train()
        self.model.teach_backbone.eval()
        groups = {True: [], False: []}  # upstream's rule: no decay for names with "norm" in them
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups["norm" not in name].append(parameter)
        options = spec.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                dict(params=groups[True], weight_decay=options.weight_decay),
                dict(params=groups[False], weight_decay=0.0),
            ],
            lr=options.lr,
            betas=(options.b1, options.b2),
            fused=True,  # on CPUs too
        )
        schedule = functools.partial(learning_rate, options=spec.schedule)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, schedule)
        self.terms = functools.partial(loss_terms, options=spec.loss, passes=passes)
        if compiled:
            self.terms = torch.compile(self.terms)
        self.autocast = autocast

    def gradients(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss's terms, with the gradients left in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        with half(images.device, self.autocast):
            terms = self.terms(self.model, images, labels)
        terms["loss"].backward()
        return {k: v.detach() for k, v in terms.items()}

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = self.gradients(images, labels)
        self.optimizer.step()
        self.scheduler.step()
        return terms


def half(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    """bfloat16 where autocast wants it."""
    return torch.autocast(device.type, torch.bfloat16) if enabled else contextlib.nullcontext()


def set_precision(precision: str) -> None:
    """`default` leaves torch's own: float32 products, but convolutions that cuDNN may run in TF32."""
    if precision != "default":
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def load_model(folder: pathlib.Path, config, device: torch.device) -> KTDA:
    """The model with the weights of `folder`, every name of which must fit."""
    with torch.device("meta"):  # nothing is allocated twice
        model = KTDA(config)
    with np.load(folder / "weights.npz") as file:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.to(device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()


def check(spec, folder: pathlib.Path, device: torch.device) -> dict:
    """The loss's terms and the gradient's norm in float32, without drop path and dropout, and where that was."""
    set_precision("float32")
    config = types.SimpleNamespace(**vars(spec.model))
    config.student = types.SimpleNamespace(**{**vars(config.student), "drop_path": 0.0})
    config.dropout = 0.0
    training = Training(load_model(folder, config, device), spec, passes=2)
    with np.load(folder / "batch.npz") as file:
        images = torch.from_numpy(file["image"]).permute(0, 3, 1, 2).to(device)
        terms = training.gradients(images, torch.from_numpy(file["label"]).long().to(device))
    gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
    terms["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
    return {"terms": {k: float(v) for k, v in terms.items()}}


def measure(spec, folder: pathlib.Path, variant: str, device: torch.device) -> dict:
    """Times training steps and forward passes. The batch travels to the device in every step."""
    passes, precision, compiled = VARIANTS[variant]
    set_precision(precision)
    torch.backends.cudnn.benchmark = True  # as mmsegmentation's runtime settings have it
    autocast = precision == "bfloat16"
    model = load_model(folder, spec.model, device)
    training = Training(model, spec, passes=passes, autocast=autocast, compiled=compiled)
    with np.load(folder / "batch.npz") as file:
        images, labels, forward = (torch.from_numpy(file[name]) for name in ("image", "label", "forward"))
    images, forward = (x.permute(0, 3, 1, 2).contiguous() for x in (images, forward))
    if device.type == "cuda":
        images, labels, forward = (x.pin_memory() for x in (images, labels, forward))

    def step():
        rows = images.to(device, non_blocking=True), labels.to(device, non_blocking=True).long()
        training.step(*rows)
        wait(device)

    report = {"passes": passes, "precision": precision, "compiled": compiled}
    report["first_steps_s"] = timed(step, spec.warmup)
    report["train"] = summary(timed(step, spec.steps), spec.batch_size)
    report["train"]["peak_bytes"] = device_peak(device)

    training.optimizer.zero_grad(set_to_none=True)
    model.eval()
    predict = torch.compile(model) if compiled else model

    def infer():
        with torch.no_grad(), half(device, autocast):
            predict(forward.to(device, non_blocking=True))
        wait(device)

    timed(infer, spec.warmup)
    report["inference"] = summary(timed(infer, spec.forwards), len(forward))
    return report


def read_spec(folder: pathlib.Path) -> types.SimpleNamespace:
    text = (folder / "spec.json").read_text()
    return json.loads(text, object_hook=lambda values: types.SimpleNamespace(**values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--variant", choices=(CHECK, *VARIANTS), required=True)
    options = parser.parse_args()
    spec = read_spec(options.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work = check if options.variant == CHECK else functools.partial(measure, variant=options.variant)
    report = work(spec=spec, folder=options.folder, device=device)
    report["platform"] = "gpu" if device.type == "cuda" else "cpu"
    report["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report["versions"] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    (options.folder / f"{options.variant}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
