"""Options of passes: every type from text and back, and what is said about wrong ones."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odsora_compiler.errors import UsageError
from odsora_compiler.pipeline.base import Pass, option
from odsora_compiler.pipeline.options import (
    ByteSize,
    construct,
    example,
    option_fields,
    print_options,
    print_value,
    type_text,
)
from odsora_compiler.pipeline.text import PassText, parse_pipeline


class Site(enum.Enum):
    SPATIAL = "spatial"
    TEMPORAL = "temporal"
    CROSS = "cross"


@dataclass(frozen=True)
class Typed(Pass):
    """A pass with an option of every type."""

    name: ClassVar[str] = "typed"

    count: int = option(3, "a number of things")
    rate: float = option(0.5, "how fast")
    flag: bool = option(False, "whether")
    word: str = option("a", "any word")
    site: Site = option(Site.CROSS, "one place")
    sites: tuple[Site, ...] = option((Site.SPATIAL, Site.CROSS), "places")
    numbers: tuple[int, ...] = option((), "numbers")
    budget: ByteSize = option(ByteSize(10**6), "bytes")
    limit: ByteSize | None = option(None, "bytes or none")
    steps: int | None = option(None, "steps or none")
    chosen: tuple[str, ...] | None = option(None, "names or none")

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count={self.count} must not be negative")


@dataclass(frozen=True)
class Plain(Pass):
    """A pass without options."""

    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class Needs(Pass):
    """A pass with an option that has no default."""

    name: ClassVar[str] = "needs"
    count: int


def made(**texts: str) -> Any:
    return construct(Typed, texts, "passes '…'")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("count", "12", 12),
        ("rate", "2", 2.0),
        ("rate", "1e-3", 0.001),
        ("flag", "true", True),
        ("flag", "false", False),
        ("word", "12", "12"),
        ("word", "none", "none"),
        ("site", "temporal", Site.TEMPORAL),
        ("sites", "temporal,spatial", (Site.TEMPORAL, Site.SPATIAL)),
        ("sites", "cross", (Site.CROSS,)),
        ("sites", "", ()),
        ("numbers", "1,2,3", (1, 2, 3)),
        ("budget", "256MB", 256_000_000),
        ("limit", "none", None),
        ("limit", "1KiB", 1024),
        ("steps", "none", None),
        ("steps", "15", 15),
        ("chosen", "a,b", ("a", "b")),
        ("chosen", "none", None),
    ],
)
def test_texts_become_values_and_print_back(key: str, text: str, value: Any) -> None:
    instance = made(**{key: text})
    found = getattr(instance, key)
    assert found == value
    assert isinstance(found, type(value))
    again = construct(Typed, print_options(instance), "")
    assert again == instance


def test_defaults_are_not_printed() -> None:
    assert print_options(made()) == {}
    assert print_options(made(count="3", steps="4")) == {"steps": "4"}


@pytest.mark.parametrize(
    ("key", "text", "takes", "for_example"),
    [
        ("count", "many", "takes a whole number, not 'many'", "typed{count=3}"),
        ("count", "1.5", "takes a whole number, not '1.5'", "typed{count=3}"),
        ("rate", "fast", "takes a number, not 'fast'", "typed{rate=0.5}"),
        ("flag", "yes", "takes true|false, not 'yes'", "typed{flag=false}"),
        ("site", "spacial", "takes spatial|temporal|cross, not 'spacial'", "typed{site=cross}"),
        ("sites", "spatial,tmporal", "Did you mean 'temporal'", "typed{sites=spatial,cross}"),
        ("numbers", "1,b", "takes a comma-separated list of a whole number", "typed{numbers="),
        ("budget", "256", None, None),
        ("budget", "256XB", "takes a size (256MB), not '256XB'", "typed{budget=1MB}"),
        ("budget", "0", "a size must be positive", "typed{budget=1MB}"),
        ("budget", "-1MB", "is not a size", "typed{budget=1MB}"),
        ("limit", "lots", "takes a size (256MB) or none, not 'lots'", "typed{limit=256MB}"),
        ("steps", "few", "takes a whole number or none, not 'few'", "typed{steps=4}"),
    ],
)
def test_a_wrong_value_names_option_type_and_example(
    key: str, text: str, takes: str | None, for_example: str | None
) -> None:
    if takes is None or for_example is None:
        assert made(**{key: text}).budget == 256
        return
    with pytest.raises(UsageError) as caught:
        made(**{key: text})
    assert f"option '{key}' of pass 'typed'" in caught.value.message
    assert takes in caught.value.message
    assert for_example in caught.value.hint


def test_an_unknown_option_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="pass 'typed' has no option 'cuont'") as caught:
        made(cuont="3")
    assert "'count'" in caught.value.hint
    with pytest.raises(UsageError, match="pass 'plain' has no option 'x'") as caught:
        construct(Plain, {"x": "1"}, "")
    assert caught.value.hint == "It takes no options."


def test_what_the_pass_itself_refuses_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="pass 'typed': count=-1 must not be negative"):
        made(count="-1")


def test_an_option_without_a_default_must_be_given() -> None:
    assert construct(Needs, {"count": "4"}, "") == Needs(4)
    with pytest.raises(UsageError, match=r"pass 'needs': .*'count'"):
        construct(Needs, {}, "")


def test_every_example_is_valid() -> None:
    for key in option_fields(Typed):
        made(**{key: example(Typed, key)})
    assert construct(Needs, {"count": example(Needs, "count")}, "") == Needs(4)


def test_types_are_said_in_words() -> None:
    assert type_text(tuple[Site, ...]) == "a comma-separated list of spatial|temporal|cross"
    assert type_text(int | None) == "a whole number or none"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("1B", 1),
        ("170MB", 170_000_000),
        ("1.5GB", 1_500_000_000),
        ("1.001kB", 1001),
        ("0.29GB", 290_000_000),
        ("64MiB", 64 << 20),
        ("2 GiB", 2 << 30),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert ByteSize.parse(text) == size


@pytest.mark.parametrize("text", ["", "MB", "1.MB", "1e6", "64i", "12Mb", "1,5GB", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        ByteSize.parse(text)


def test_a_size_beyond_all_measure_is_still_a_number() -> None:
    assert ByteSize.parse("9" * 400) > 10**399


@given(st.integers(min_value=1, max_value=10**15).map(ByteSize))
def test_sizes_print_back(size: ByteSize) -> None:
    assert ByteSize.parse(print_value(size)) == size


@given(
    st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.sets(st.sampled_from(Site))
)
def test_values_go_through_pipeline_text(rate: float, flag: bool, sites: set[Site]) -> None:
    instance = Typed(rate=rate, flag=flag, sites=tuple(sites))
    text = str(PassText("typed", tuple(print_options(instance).items())))
    (parsed,) = parse_pipeline(text)
    assert construct(Typed, dict(parsed.options), text) == instance
