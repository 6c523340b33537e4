"""Mail as `make spam` prepares it: as it was sent, and as a reader sees it."""

import base64
import pathlib
import textwrap

import pytest

TOOLS = pathlib.Path(__file__).parents[1] / "tools"


@pytest.fixture
def tool(monkeypatch):
    """The script of `make spam`."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import build_spam

    return build_spam


def message(head, body):
    return textwrap.dedent(head).strip() + "\n\n" + textwrap.dedent(body).strip() + "\n"


def test_html_is_read_without_its_tags_scripts_and_encoding(tool):
    whole = message(
        """
        Subject: =?utf-8?q?Caf=C3=A9?= =?utf-8?q?_tonight?=
        Content-Type: text/html; charset=utf-8
        Content-Transfer-Encoding: quoted-printable
        """,
        """
        <html><script>var x =3D "<b>no</b>";</script><body>
        <p>Win &amp; <b>lo=
        se</b></p><table><tr><td>one</td><td>tw=C3=B3</td></tr></table></html>
        """,
    )
    assert tool.plain(whole) == "Café tonight\n\n[html]\n\nWin & lose\n\n one twó\n"
    assert tool.sent(whole).startswith("=?utf-8?q?Caf=C3=A9?=")
    assert "=3D" in tool.sent(whole)


def test_parts_are_decoded_and_attachments_named(tool):
    secret = base64.b64encode("naïve".encode("latin-1")).decode()
    whole = message(
        """
        Subject: =?base64?q?as=20sent?=
        Content-Type: multipart/mixed; boundary=zz
        """,
        f"""
        --zz
        Content-Type: text/plain; charset=nonsense
        Content-Transfer-Encoding: base64

        {secret}
        --zz
        Content-Type: image/gif
        Content-Transfer-Encoding: base64

        R0lGODlh
        --zz--
        """,
    )
    assert tool.plain(whole) == "as sent\n\nnaïve\n[image/gif]\n"


def test_a_plain_message_stays(tool):
    whole = message("Subject: lunch", "a < b\n\nand  c =3D d")
    assert tool.plain(whole) == "lunch\n\na < b\n\nand c =3D d\n"
