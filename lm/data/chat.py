"""Chat templates: a conversation written as the text that an instruction-tuned model was taught."""

import json
import time
from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np

from lm.config import ConfigError
from lm.data.pretrained import CHAT, HuggingFaceTokenizer
from lm.data.tokenizer import Ids, Pieces, Tokenizer


class Chat(Pieces):
    """A tokenizer whose prompts are what a user says; else the one it is made of.

    Raises:
        ConfigError: the tokenizer has no template, or the package jinja2 is not there.
    """

    def __init__(self, coder: Tokenizer) -> None:
        text = template(coder)
        if text is None or not isinstance(coder, HuggingFaceTokenizer):
            raise ConfigError(
                "--chat: the model has no chat template (tokenizer_config.json or "
                f"{CHAT}); leave --chat out to continue the prompt as text"
            )
        super().__init__(coder.pieces)
        self.size, self.eot, self.ends = coder.size, coder.eot, coder.ends
        self._coder, self._template = coder, _compiled(text)

    def encode(self, text: str) -> Ids:
        return self._coder.encode(text)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return self._coder.decode(ids)

    def files(self) -> dict[str, bytes]:
        return self._coder.files()

    def prompt(self, text: str) -> Ids:
        """Returns the ids of a conversation that begins with `text`, up to the answer."""
        return self.conversation([{"role": "user", "content": text}])

    def conversation(self, messages: list[dict[str, str]]) -> Ids:
        """Returns the ids of messages (`role`, `content`), up to the answer."""
        import jinja2

        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        marks = {name: self._coder.special(name) for name in names}
        try:
            text = self._template.render(
                messages=messages, add_generation_prompt=True, **marks
            )
        except jinja2.TemplateError as error:
            raise ConfigError(f"--chat: the template refuses this ({error})") from error
        ids = self._coder.encode_marked(text)
        # A template may leave the first mark to the tokenizer.
        begins = bool(len(ids)) and self._coder.token_bytes[ids[0]] == 0
        return (
            ids
            if begins
            else np.concatenate([np.array([self._coder.eot], np.int32), ids])
        )


def template(coder: Tokenizer) -> str | None:
    """Returns the chat template of a tokenizer, None where it has none."""
    files = coder.files()
    if CHAT in files:
        return files[CHAT].decode()
    found = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    if isinstance(found, list):  # several with names
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found


def _compiled(text: str) -> Any:
    try:
        import jinja2
        import jinja2.ext
        import jinja2.sandbox
    except ImportError as error:
        raise ConfigError(
            "--chat needs the package jinja2: pip install 'lm[hf]' (or jinja2)"
        ) from error

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    class Generation(jinja2.ext.Extension):
        """Marks what the model writes, for training: here its text alone."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    # What templates may use: see "chat templating" in the documentation of transformers.
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: time.strftime(form)
    environment.filters["tojson"] = lambda x, **how: json.dumps(
        x, **{"ensure_ascii": False, **how}
    )
    try:
        return environment.from_string(text)
    except jinja2.TemplateError as error:
        raise ConfigError(f"--chat: the chat template has a fault ({error})") from error
