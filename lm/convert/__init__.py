"""Models of other programs in and out: Hugging Face directories, and GGUF files in.

A family (a `model_type`) is a file here: how its config.json is read and written, and a table of
names that serves both ways. `families.py` lists them; `weights.py` moves arrays; `work.py` makes a
work directory of what is imported, and a directory of a work directory.
"""
