"""Types of the arguments of `ntdne`: each makes a value of a text, or says what was expected.

argparse's ArgumentTypeError is raised where the text stands for no such value.
"""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import yaml

from ntdne_kernels.audit import METHODS as AUDIT_METHODS

T = TypeVar("T")


def positive(text: str) -> float:
    """A finite number above 0."""
    return _checked(float, text, lambda value: 0 < value < math.inf, "a positive number")


def count(text: str) -> int:
    """A whole number from 1."""
    return _checked(int, text, lambda value: value >= 1, "a whole number from 1")


def number_from_0(text: str) -> int:
    """A whole number from 0."""
    return _checked(int, text, lambda value: value >= 0, "a whole number from 0")


def bands(text: str) -> tuple[int, ...]:
    """Numbers of bands, as 4,3,2."""
    numbers = text.split(",")
    return _checked(
        lambda _: tuple(map(int, numbers)), text, lambda found: min(found) >= 1, "numbers of bands from 1, as 4,3,2"
    )


def threshold(text: str) -> str | float:
    """How an audit chooses suspects: a method's name, or a score."""
    expected = f"{', '.join(AUDIT_METHODS)}, or a number between 0 and 1"
    return text if text in AUDIT_METHODS else _checked(float, text, lambda value: 0 < value < 1, expected)


def device(text: str) -> str:
    """A device that PyTorch has here."""

    def found(text: str) -> str:
        try:
            torch.empty(0, device=text)
        except (RuntimeError, AssertionError) as error:
            raise ValueError from error
        return text

    return _checked(found, text, bool, "a device of this machine, as cpu")


def _checked(parse: Callable[[str], T], text: str, valid: Callable[[T], bool], expected: str) -> T:
    """The value that a text of the command line stands for; argparse's error unless it is valid."""
    try:
        value = parse(text)
        if valid(value):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")


def parse_value(text: str) -> Any:
    """None for "none", a number, or whatever else YAML makes of the text; ValueError where it is not YAML.

    Example:
        >>> parse_value("none"), parse_value("1e-3"), parse_value("auto")
        (None, 0.001, 'auto')
    """
    if text.lower() == "none":
        return None
    try:
        return float(text) if re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", text, re.IGNORECASE) else yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--loss-option: expected a number, auto or none, got {text!r}") from None
