"""Calls that do not run as was asked for: counted, warned of once, or refused."""

import warnings

import torch


class Reporting:
    """Mixin of modules with ``fast_options``."""

    def _report(self, calls: dict[str, int], what: str, would: str, reason: str, forbidden: str | None = None) -> None:
        """Counts a call in ``calls`` by its ``reason``, and warns of each reason once that the module ``what``.

        Traced code stays silent. Raises NotImplementedError, that it ``would``, where the call is ``forbidden`` or the options
        ask for an error.
        """
        if self.fast_options.on_unsupported == "error":
            forbidden = forbidden or "and on_unsupported='error'"
        if forbidden:
            raise NotImplementedError(f"roberta_fast: {would}, {reason}, {forbidden}")
        if torch.compiler.is_compiling():
            return
        if reason not in calls and self.fast_options.on_unsupported == "warn":
            warnings.warn(f"roberta_fast: {type(self).__name__} {what}: {reason}", RuntimeWarning, stacklevel=4)
        calls[reason] = calls.get(reason, 0) + 1
