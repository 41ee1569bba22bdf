"""The constructor settings of a prior, which a weights file stores."""

from __future__ import annotations

import inspect
import json
from typing import Any

from torch import Tensor


class Configurable:
    """
    A prior that says with which arguments it is built anew.

    :func:`deepinv_deal.weights.save` stores them beside the weights, and
    :func:`deepinv_deal.weights.load` hands them to the constructor. A class keeps every
    argument as an attribute of the same name, or overrides :meth:`config`.
    """

    def config(self, **known: Any) -> dict[str, Any]:
        """
        Returns the keyword arguments that build a prior of the same sizes.

        Numbers that are parameters or buffers are given by their current values.

        |sep|

        :Example:

        >>> from deepinv_deal.priors import SAFIPrior
        >>> SAFIPrior(num_filters=8, sigma=0.5).config()
        {'num_filters': 8, 'sigma': 0.5}

        :param Any known: values of arguments that are no attributes of the same name.
        :return: arguments by name, of the types that JSON has.
        :raises TypeError: for an argument that is no such attribute.
        """
        name = type(self).__name__
        settings = {}
        for argument in inspect.signature(type(self)).parameters.values():
            variadic = argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
            value = known.get(argument.name, getattr(self, argument.name, self))
            if isinstance(value, Tensor) and value.ndim == 0:
                value = value.item()
            try:
                json.dumps(self if variadic else value)
            except TypeError as error:
                raise TypeError(
                    f"{name} takes the argument {str(argument)!r}, whose value a "
                    f"weights file cannot store: keep a number, text or list as "
                    f"self.{argument.name}, or override {name}.config(), which returns "
                    "the arguments that build the prior."
                ) from error
            settings[argument.name] = value
        return settings
