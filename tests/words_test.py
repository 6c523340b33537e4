"""Words of a text to classify are changed where asked for, and nothing else is."""

import builtins
import json

import pytest
import toy

from lm.data import loader, sources, words
from lm.data.loader import Bytes, Data
from lm.data.words import Words

TEXT = "The running dogs’ owner isn't here;  she was walking, and RUNS.\n"


@pytest.fixture
def _installed():
    pytest.importorskip("stop_words")
    pytest.importorskip("snowballstemmer")


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (Words(), TEXT),
        (Words(lower=True), TEXT.lower()),
        (
            Words(stem="english"),
            "the run dog’ owner isn't here;  she was walk, and run.\n",
        ),
        (Words(lower=True, stop_words="spanish"), TEXT.lower().replace("  ", " ")),
        (Words(lower=True, stem="spanish"), None),
    ],
)
def test_what_is_done_to_words(chosen, expected):
    found = chosen.apply(TEXT)
    if expected is not None:
        assert found == expected
    assert [c for c in found if c in ";,.\n"] == list(";,.\n")  # what is between stays


@pytest.mark.usefixtures("_installed")
def test_stop_words_go():
    found = Words(stop_words="english").apply("the whale and\nthe Harpooneer\n")
    assert found.split() == ["whale", "Harpooneer"] and "\n" in found


@pytest.mark.usefixtures("_installed")
def test_only_the_first_field_is_changed_and_the_store_is_another(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "Running DOGS", "label": "RUNNING"}) + "\n")
    source = sources.find(f"jsonl:{path}#text+label")
    chosen = words.Prepared(source, Words(lower=True, stem="english"))
    [part] = chosen.parts("train")
    assert list(part.documents()) == [("run dog", "RUNNING")]
    assert isinstance(chosen, sources.Source) and isinstance(part, sources.Part)
    prints = {
        words.Prepared(source, w).fingerprint("train") for w in (Words(), chosen.words)
    }
    assert len(prints) == 2 and source.fingerprint("train") not in prints
    data = Data(
        source=(source.spec,),
        tokenizer=Bytes(),
        holdout=0.0,
        store_dir=str(tmp_path / "store"),
    )
    coder = loader.tokenizer(data, 257)
    [store] = loader.stores(data, coder, words=chosen.words)
    assert coder.decode(store.read(1, 7)) == "run dog"


def test_what_is_not_there_is_told(monkeypatch):
    pytest.importorskip("stop_words")
    with toy.refused("objective.words.stop_words=englsh", "did you mean 'english'?"):
        Words(stop_words="englsh").apply("a")
    real = builtins.__import__

    def absent(name, *rest):
        if name in ("stop_words", "snowballstemmer"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    words._stop_words.cache_clear()
    words._stemmer.cache_clear()
    for chosen, package in (
        (Words(stop_words="english"), "stop-words"),
        (Words(stem="english"), "snowballstemmer"),
    ):
        with toy.refused(f"`pip install {package}`"):
            chosen.apply("a")
