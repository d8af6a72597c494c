"""HTML as text: whatever is put in comes out as text."""

import re
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from hqc.evaluation.markup import element, escape


@given(text=st.text())
def test_any_text_makes_a_well_formed_element(text: str) -> None:
    markup = element("g", element("title", escape(text)), data_name=text, id=None)
    parsed = ElementTree.fromstring(markup)
    title = parsed.find("title")
    assert title is not None
    kept = re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text)
    assert (title.text or "").replace("\r", "\n") == kept.replace("\r\n", "\n").replace("\r", "\n")


def test_text_for_plotly_keeps_its_quotes() -> None:
    assert escape("<'\"&>", quote=False) == "&lt;'\"&amp;&gt;"
