"""What can go wrong: errors that say what was expected, what was found and what to do."""

__all__ = [
    "AttnError",
    "InputError",
    "MissingExtraError",
    "NoAttentionFoundError",
    "OptionError",
    "ReadoutError",
    "RuleError",
    "TargetError",
    "WiringError",
]


class AttnError(ValueError):
    """Base class of every error that captum_attn raises on purpose."""


class InputError(AttnError):
    """The inputs cannot be explained as they are: type, shape, batch size, NaN, cached keys."""


class TargetError(AttnError):
    """The target or the objective does not select one scalar per example."""


class OptionError(AttnError):
    """An option has a value that the method does not know, or that does not fit the model."""


class NoAttentionFoundError(AttnError):
    """No softmax(QK^T)V was seen while the model ran."""


class WiringError(AttnError):
    """Which token stream an attention call asks or reads could not be observed."""


class ReadoutError(AttnError):
    """Which tokens the explained output reads could not be observed; `readout=` settles it."""


class RuleError(AttnError):
    """An operation between the output and the inputs has no rule that relevance could follow."""


class MissingExtraError(AttnError, ImportError):
    """A package is not installed that the called part needs; the message names the extra."""
