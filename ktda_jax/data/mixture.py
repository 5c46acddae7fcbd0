"""Which rows of a batch have labels, when others come from images without."""

import dataclasses
from fractions import Fraction
from typing import Any

from ktda_jax import UserError


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Of every `period` rows of a micro-batch the last `unlabelled` have no labels.

    A fixed pattern of the row's number, so that batches do not depend on devices or processes, every device gets the
    same share, and picking the labelled rows moves none between devices. `accumulate` neighbouring rows go to as many
    micro-batches, one each: they are of one kind.
    """

    unlabelled: int
    period: int
    accumulate: int = 1

    @classmethod
    def of(cls, share: float, rows: int, accumulate: int = 1) -> "Mixture":
        """Of `share` unlabelled rows among the `rows` of a device's micro-batch; UserError if they are not whole."""
        exact = Fraction(share).limit_denominator(rows)
        if not 0 < exact < 1 or rows % exact.denominator or abs(exact - share) > 1e-3:
            possible = ", ".join(f"{k / rows:.4g}" for k in range(1, rows)) or "none: give it more rows"
            raise UserError(
                f"config.data.unlabelled_share is {share:g}, but a device's {rows} row(s) of a micro-batch cannot be "
                f"divided so; possible: {possible}"
            )
        return cls(exact.numerator, exact.denominator, accumulate)

    def place(self, row: int) -> tuple[bool, int]:
        """Whether row number `row`, counted over all batches, has a label; and its number among those of its kind."""
        group, within = divmod(row, self.period * self.accumulate)
        with_label = (self.period - self.unlabelled) * self.accumulate
        if within < with_label:
            return True, group * with_label + within
        return False, group * self.unlabelled * self.accumulate + within - with_label

    def labelled(self, rows: Any) -> Any:
        """The labelled rows of a micro-batch's array (B, ...)."""
        return self._groups(rows)[:, : self.period - self.unlabelled].reshape(-1, *rows.shape[1:])

    def others(self, rows: Any) -> Any:
        """The rows without labels."""
        return self._groups(rows)[:, self.period - self.unlabelled :].reshape(-1, *rows.shape[1:])

    def _groups(self, rows: Any) -> Any:
        return rows.reshape(-1, self.period, *rows.shape[1:])
