"""`Report`: what a proof of a conversion found."""

from dataclasses import dataclass

import torch

from zeta.convert.errors import ConversionError

COLUMNS = ("output", "weights", "inputs", "parameters")


@dataclass(frozen=True)
class Case:
    """The largest errors of one call.

    Each is relative to the largest value of its sort that the source gives: ``1e-7`` means that no
    two numbers differ by more than a ten-millionth of it. None: not compared.

    Attributes:
        name: What the call was.
        output: Of the output.
        weights: Of the attention weights.
        inputs: Of the gradients of all inputs.
        parameters: Of the gradients of all parameters.
    """

    name: str
    output: float
    weights: float | None = None
    inputs: float | None = None
    parameters: float | None = None

    @property
    def errors(self) -> tuple[float | None, ...]:
        """In the order of the columns of a report."""
        return self.output, self.weights, self.inputs, self.parameters

    def within(self, tolerance: float) -> bool:
        """Whether all errors are at most ``tolerance``; NaN is not."""
        return all(error is None or error <= tolerance for error in self.errors)


@dataclass(frozen=True)
class Report:
    """What `check` found; printed, it is a table.

    Attributes:
        source: What was converted.
        cases: One a call.
        changed: Parameters, under Zeta's names, that are not the source's bit for bit.
        compared: How many parameters were compared so.
        not_compared: What could not be compared, and why.
        tolerance: The largest error that passes.
        dtype: In which both were run.
    """

    source: str
    cases: tuple[Case, ...]
    changed: tuple[str, ...]
    compared: int
    not_compared: dict[str, str]
    tolerance: float
    dtype: torch.dtype

    @property
    def passed(self) -> bool:
        """Whether every parameter is the source's and every error is within the tolerance."""
        return (
            bool(self.cases)
            and not self.changed
            and all(case.within(self.tolerance) for case in self.cases)
        )

    def require(self) -> "Report":
        """The report itself.

        Raises:
            ConversionError: It did not pass.
        """
        if not self.passed:
            raise ConversionError(f"the conversion is not exact:\n{self}")
        return self

    def __str__(self) -> str:
        verdict = "equal" if self.passed else "DIFFERENT"
        width = max(len(case.name) for case in self.cases) if self.cases else 0
        lines = [
            f"{self.source} and zeta.nn.MultiheadAttention: {verdict}",
            f"largest errors, relative, in {str(self.dtype).removeprefix('torch.')}; "
            f"up to {self.tolerance:.0e} passes",
            f"  {'':<{width}}" + "".join(f"{column:>12}" for column in COLUMNS),
        ]
        for case in self.cases:
            cells = "".join(f"{_number(error):>12}" for error in case.errors)
            mark = "" if case.within(self.tolerance) else "  <-"
            lines.append(f"  {case.name:<{width}}{cells}{mark}")
        same = self.compared - len(self.changed)
        lines.append(f"parameters the same bit for bit: {same} of {self.compared}")
        lines += [f"  {name} differs" for name in self.changed]
        if self.not_compared:
            lines.append("not compared:")
            lines += [f"  {what}: {why}" for what, why in self.not_compared.items()]
        return "\n".join(lines)


def _number(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"
