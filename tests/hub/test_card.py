"""Our section of a model card is added once, replaced later, and never replaces one of a newer version."""

import pytest

from pema_adapters.errors import FormatError
from pema_adapters.hub.card import VERSION, has_pema_section, render_card

UNVERSIONED = "# Task\n\nMine.\n\n<!-- pema: begin -->\nold words\n<!-- pema: end -->\n\nAlso mine.\n"


def test_a_section_states_its_version():
    card = render_card("", "me/task", "New words.", {}, {})
    assert f"<!-- pema: version {VERSION} -->" in card


def test_a_section_without_version_is_replaced_and_other_text_stays():
    card = render_card(UNVERSIONED, "me/task", "New words.", {}, {})
    assert "old words" not in card
    assert card.index("Mine.") < card.index("New words.") < card.index("Also mine.")
    assert has_pema_section(card)


def test_rendering_twice_changes_nothing():
    card = render_card(UNVERSIONED, "me/task", "New words.", {}, {})
    assert render_card(card, "me/task", "New words.", {}, {}) == card


@pytest.mark.parametrize("space", ["\n", " ", ""])
def test_a_section_of_a_newer_version_is_refused(space):
    newer = UNVERSIONED.replace("begin -->", f"begin -->{space}<!-- pema: version {VERSION + 1} -->")
    with pytest.raises(FormatError, match=r"me/task: README.md: written by a newer version .* upgrade pema-adapters"):
        render_card(newer, "me/task", "New words.", {}, {})


def test_a_section_of_version_zero_is_refused():
    damaged = UNVERSIONED.replace("begin -->", "begin -->\n<!-- pema: version 0 -->")
    with pytest.raises(FormatError, match=r"me/task: README\.md: its version is '0'"):
        render_card(damaged, "me/task", "New words.", {}, {})
