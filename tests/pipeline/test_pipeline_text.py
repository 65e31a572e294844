"""Pipeline text: what is parsed prints back, and a mistake is shown where it is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odsora_compiler.errors import UsageError
from odsora_compiler.pipeline.text import PassText, parse_pipeline, print_pipeline

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]*", fullmatch=True)
PASSES = st.builds(
    PassText,
    NAMES,
    st.lists(st.tuples(NAMES, st.text()), max_size=4, unique_by=lambda item: item[0]).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PASSES, max_size=4).map(tuple))
def test_what_is_printed_parses_back(passes: tuple[PassText, ...]) -> None:
    text = print_pipeline(passes)
    assert parse_pipeline(text) == passes
    assert print_pipeline(parse_pipeline(text)) == text


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet='ab,{}= "\\\n1', max_size=20))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        passes = parse_pipeline(text)
    except UsageError:
        return
    assert parse_pipeline(print_pipeline(passes)) == passes


@pytest.mark.parametrize(
    "text",
    [
        "tdtm",
        "tdtm,cidl",
        "tdtm{steps=15 sites=spatial,temporal},cidl{budget=256MB}",
        'p{a="two words" b="" c="x{y}" d="say \\"hi\\""}',
        "p{a=b=c path=x/y.z}",
        "",
    ],
)
def test_text_as_a_user_writes_it_prints_back_exactly(text: str) -> None:
    assert print_pipeline(parse_pipeline(text)) == text


def test_white_space_between_parts_is_free() -> None:
    loose = " tdtm { steps=15\n  sites=spatial,temporal } ,\tcidl "
    assert print_pipeline(parse_pipeline(loose)) == "tdtm{steps=15 sites=spatial,temporal},cidl"


def test_values_are_unquoted() -> None:
    (item,) = parse_pipeline('p{a="two words" b="" c="\\\\ \\""}')
    assert item.options == (("a", "two words"), ("b", ""), ("c", '\\ "'))


@pytest.mark.parametrize(
    ("text", "expected", "position"),
    [
        (",cidl", "a pass name", 1),
        ("tdtm,,cidl", "a pass name", 6),
        ("tdtm,", "a pass after ','", 6),
        ("tdtm cidl", "',' between passes", 6),
        ("tdtm}", "',' between passes", 5),
        ("tdtm{steps=15", "'}' to close the options of 'tdtm'", 14),
        ("tdtm{steps}", "'=' after option 'steps'", 11),
        ("tdtm{steps =15}", "'=' after option 'steps'", 11),
        ("tdtm{steps=}", "a value for option 'steps'", 12),
        ("tdtm{=15}", "an option name or '}'", 6),
        ("tdtm{steps=15,sites=x}", None, None),
        ('p{a="open}', "a value for option 'a'", 5),
        ("3p", "a pass name", 1),
    ],
)
def test_a_mistake_is_shown_where_it_is(
    text: str, expected: str | None, position: int | None
) -> None:
    if expected is None:
        # A comma is part of the value: that is how lists are written.
        assert parse_pipeline(text)[0].options == (("steps", "15,sites=x"),)
        return
    with pytest.raises(UsageError) as caught:
        parse_pipeline(text)
    assert caught.value.message == f"passes '{text}': expected {expected} at position {position}"
    assert "tdtm{steps=15" in caught.value.hint


def test_an_option_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="option 'a' of 'p' is given twice"):
        parse_pipeline("p{a=1 a=2}")
