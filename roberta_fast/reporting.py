"""Calls that do not run as was asked for: counted, warned of once, or refused."""

import warnings

import torch
from torch import nn

from roberta_fast.options import FastOptions


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


class FastModel(Reporting):
    """Mixin of the models around an encoder, which become a subclass of themselves by their ``__class__``.

    stock: the class that they were of. stock_calls: ``{reason: calls}`` that ``_report`` counted. whole_calls: the same of calls
    that computed rows which could have been left out; that is not what anyone has to be warned of.
    """

    stock: type[nn.Module]
    fast_options: FastOptions
    stock_calls: dict[str, int]
    whole_calls: dict[str, int]

    def _count_whole(self, reason: str) -> None:
        if not torch.compiler.is_compiling():
            self.whole_calls[reason] = self.whole_calls.get(reason, 0) + 1


def make_fast(model: FastModel, options: FastOptions) -> None:
    """Puts a fast model's options in order."""
    model.fast_options, model.stock_calls, model.whole_calls = options, {}, {}


def make_stock(model: FastModel) -> None:
    """Undoes ``make_fast`` and the change of class."""
    stock = model.stock
    for name in ("fast_options", "stock_calls", "whole_calls"):
        model.__dict__.pop(name, None)
    model.__class__ = stock
