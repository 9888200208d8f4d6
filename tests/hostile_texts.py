"""Bad texts: contents of files, and paths that hold no text."""

import json
import os

from hostile import edited


def parquet(columns):
    import pyarrow
    from pyarrow import parquet as writer

    sink = pyarrow.BufferOutputStream()
    writer.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def texts(random, count):
    """(file name, bytes) of texts that cannot be used; a few can."""
    prose = "The quick brown fox jumps over the lazy dog.\n" * 30
    lines = "".join(json.dumps({"text": line}) + "\n" for line in prose.splitlines())
    good = parquet({"text": prose.splitlines()})
    for name, data in {
        "empty": b"",
        "a blank": b" \n\t\r\n  ",
        "one letter": b"x",
        "NULs": bytes(9999),
        "0xff": b"\xff" * 9999,
        "random": random.randbytes(50000),
        "UTF-16": prose.encode("utf-16"),
        "UTF-32": prose.encode("utf-32"),
        "latin-1": ("ä" * 99).encode("latin-1"),
        "surrogates": b"\xed\xa0\x80" * 99,
        "overlong": b"\xc0\xaf" * 99,
        "cut": ("é" * 999).encode()[:-1],
        "one line": b"x" * 5 * 10**6,
        "only BOM": b"\xef\xbb\xbf",
        "ELF": b"\x7fELF" + bytes(range(256)) * 20,
        "gzip": b"\x1f\x8b\x08" + random.randbytes(999),
        "zip": b"PK\x03\x04" + random.randbytes(999),
        "parquet": good,
        "blanks": b" " * 10**6,
        "lines": b"\n" * 10**5,
    }.items():
        for ending in ("txt", "jsonl", "json", "parquet", "text", "TXT"):
            if len(data) < 10**5 or ending in ("txt", "jsonl"):
                yield f"{name}.{ending}", data
    for name, text in {
        "not closed": '{"text": "x"',
        "a list": '["x"]\n' * 9,
        "numbers": "1\n2\n",
        "strings": '"x"\n' * 9,
        "null": "null\n" * 9,
        "no text": '{"txt": "x"}\n' * 9,
        "text null": '{"text": null}\n' * 9,
        "text list": '{"text": ["x"]}\n' * 9,
        "text mixed": '{"text": "x"}\n{"text": 7}\n',
        "text map": '{"text": {"a": 1}}\n' * 9,
        "later broken": lines + "{",
        "later no text": lines + '{"b": 1}\n',
        "empty objects": "{}\n" * 99,
        "nested": "[" * 10**5,
        "nested text": '{"text": ' + "[" * 999 + "]" * 999 + "}",
        "NaN": '{"text": NaN}\n' * 9,
        "long key": '{"' + "k" * 10**5 + '": 1}',
        "thousand keys": json.dumps({f"k{i}": i for i in range(1000)}),
        "twice": '{"text": "a", "text": "b"}',
        "surrogate": '{"text": "\\ud800"}\n' * 9,
        "whole file a list": json.dumps([{"text": "x"}] * 9),
        "huge number": '{"text": 1e999}',
        "digits": '{"text": ' + "9" * 5000 + "}",
        "CR": lines.replace("\n", "\r"),
        "array": "[" + '{"text":"x"},' * 9,
    }.items():
        yield f"{name}.jsonl", text.encode()
        yield f"{name}.json", text.encode()
    for name, columns in {
        "other column": {"txt": ["x"]},
        "numbers": {"text": [1, 2]},
        "nulls": {"text": [None, None]},
        "no rows": {"text": []},
        "lists": {"text": [["x"]]},
    }.items():
        yield f"{name}.parquet", parquet(columns)
    for ending in ("", "pdf", "csv", "bin", "gguf", "arrow", "txt.gz", "zip", "txt ", "é", "safetensors", "py"):
        yield f"ending.{ending}" if ending else "no ending", prose.encode()
    for _ in range(count):
        kind = random.choice(("parquet", "parquet", "jsonl", "txt"))
        data = {"parquet": good, "jsonl": lines.encode(), "txt": prose.encode()}[kind]
        yield f"edited.{kind}", edited(data, random)


def text_paths(room):
    """Paths that hold no readable text: (words, path)."""
    (room / "folder.txt").mkdir()
    (room / "dangling.txt").symlink_to(room / "nowhere.txt")
    (room / "loop.txt").symlink_to(room / "loop.txt")
    os.mkfifo(room / "pipe.txt")
    os.mkfifo(room / "pipe.jsonl")
    os.mkfifo(room / "pipe")
    (room / "endless.txt").symlink_to("/dev/zero")
    (room / "device.txt").symlink_to("/dev/zero")
    (room / "null.txt").symlink_to("/dev/null")
    (room / "unreadable.txt").symlink_to("/proc/self/mem")
    (room / "file").write_text("precious")
    return {
        "missing": room / "missing.txt",
        "a folder": room / "folder.txt",
        "a dangling link": room / "dangling.txt",
        "a loop": room / "loop.txt",
        "a pipe": room / "pipe.txt",
        "a jsonl pipe": room / "pipe.jsonl",
        "a pipe without ending": room / "pipe",
        "endless": room / "endless.txt",
        "a device": room / "device.txt",
        "null": room / "null.txt",
        "the room": room,
        "empty": "",
        "a dot": ".",
        "a NUL": "a\0b.txt",
        "a long name": "n" * 300 + ".txt",
        "a long path": "/".join(["d" * 200] * 30),
        "a surrogate": "\ud800.txt",
        "a line break": "a\nb.txt",
        "a pattern": str(room / "*.txt"),
        "another pattern": str(room / "{a,b}.txt"),
        "a url": "http://127.0.0.1:9/x.txt",
        "a file url": f"file://{room}/file",
        "an s3 url": "s3://a/b.txt",
        "a hub url": "hf://datasets/a/b",
        "a zip url": f"zip://x.txt::{room}/file",
        "a hub id": "no/such-data-set-here",
        "a tilde": "~/x.txt",
        "below a file": room / "file" / "x.txt",
        "unreadable": room / "unreadable.txt",
        "markup": "[/red].txt",
        "a backslash": "\\[x.txt",
        "a word": "wikitext",
        "many slashes": "a/b/c/d",
    }
