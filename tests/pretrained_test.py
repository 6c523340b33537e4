"""Tokenizers of Hugging Face give text back exactly; chat templates reach nothing else."""

import datetime

import families_hf
import pytest
import toy
from etils import epath

from lm.data import chat, pretrained
from lm.data import tokenizer as tokenizers

pytest.importorskip(
    "tokenizers", reason="tokenizer.json needs the extra hf: tokenizers"
)
pytest.importorskip("jinja2", reason="templates need the extra hf: jinja2")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("tokenizer"))
    families_hf.write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("text", families_hf.TEXTS)
def test_text_comes_back_and_every_byte_is_counted(source, text):
    coder = tokenizers.load(pretrained.HuggingFace(path=str(source)))
    ids = coder.encode(text)
    assert coder.decode(ids) == text
    assert coder.token_bytes[ids].sum() == len(text.encode())
    assert not {0, 1} & set(ids.tolist())
    again = tokenizers.from_files(coder.files())
    assert again.fingerprint == coder.fingerprint
    assert (again.eot, again.ends, again.size) == (1, (1,), 259)
    assert coder.prompt("a").tolist() == [1, *coder.encode("a")]


def test_words_of_an_uncased_tokenizer_come_back_without_their_spelling(tmp_path):
    """So no bytes are counted; [CLS] begins a text, [SEP] ends it, and neither is made from it."""
    families_hf.write_word_pieces(epath.Path(tmp_path))
    coder = tokenizers.load(pretrained.HuggingFace(path=str(tmp_path)))
    ids = coder.encode("Hello  WORLD! [SEP]")
    assert ids.tolist() == [5, 6, 7, 9, 1, 1, 1]
    assert coder.decode(ids[:4]) == "hello world !"
    assert (coder.eot, coder.close, coder.mask, coder.size) == (2, (3,), 4, 10)
    assert not coder.token_bytes.any()


def test_a_conversation_is_written_by_the_template(source):
    coder = chat.Chat(tokenizers.load(pretrained.HuggingFace(path=str(source))))
    ids = coder.prompt("ab").tolist()
    plain = lambda text: coder.encode(text).tolist()  # noqa: E731
    assert ids == [0, *plain("user: ab"), 1, 0, *plain("assistant: ")]
    with toy.refused("--chat", "none"):
        coder.conversation([{"role": "system", "content": "x"}])
    with toy.refused("no chat template"):
        chat.Chat(tokenizers.ByteTokenizer())


def templated(source, text):
    folder = tokenizers.load(pretrained.HuggingFace(path=str(source))).files()
    return pretrained.HuggingFaceTokenizer(
        {**folder, "chat_template.jinja": text.encode()}
    )


def test_a_template_reaches_nothing_of_the_program(source):
    text = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with toy.refused("--chat", "unsafe"):
        chat.Chat(templated(source, text)).prompt("x")


def test_a_template_has_what_those_of_transformers_use(source):
    """The date (gpt-oss), JSON with an indent (Llama 3), and marks of what the model writes."""
    text = (
        "{{ strftime_now('%Y') }}{{ {'é': 1} | tojson(indent=1) }}"
        "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    )
    coder = chat.Chat(templated(source, text))
    year = datetime.date.today().year
    assert coder.decode(coder.prompt("ab")[1:]) == f'{year}{{\n "é": 1\n}}ab'


@pytest.mark.parametrize(
    ("folder", "made", "words"),
    [
        ("run/tokenizer", False, ("not there", "--mode=import --from=DIR --workdir=")),
        ("run/tokenizer", True, ("has no tokenizer.json",)),
        ("elsewhere", False, ("has no tokenizer.json",)),
    ],
)
def test_a_directory_without_a_tokenizer_is_told(tmp_path, folder, made, words):
    path = tmp_path / folder
    if made:
        path.mkdir(parents=True)
    with toy.refused("data.tokenizer.path", *words):
        pretrained.read(str(path))
