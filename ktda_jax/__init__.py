"""KTDA: fine-grained remote sensing segmentation in JAX."""


class UserError(ValueError):
    """What a user can mend: a setting, a file, a flag. Its text, all that verbs show, names it in one line."""


def load_pretrained(path, **options):
    """A model for prediction: `load_pretrained("weights/grass").predict("tile.tif").labels`.

    path: the workdir of a training (its best checkpoint), a folder of `python -m ktda_jax.convert`, a published .pth,
    or hf://ORG/NAME. options: dtype (float32), teacher_heads and fmm_heads where no description tells them (what is
    then assumed is said in a line). UserError says in a line what is wrong.
    """
    from ktda_jax.prediction import segmenter  # only here: the data builders import this package without JAX

    return segmenter.load_pretrained(path, **options)
