"""A checkpoint with a record to report: figures of three methods, and what of hostile names can be put into one."""

import json
from html.parser import HTMLParser

from elastic_sparsity import ElasticCheckpoint

PERPLEXITY = {
    "elastic": {"0.5": 33.5434, "0.6": 47.785, "0.7": 82.4988, "2:4": 50.5725},
    "wanda": {"0.5": 53.1479, "0.6": 148.9769, "0.7": 1718.7753, "2:4": 211.9635},
    "sparsegpt": {"0.5": 48.4819, "0.6": 110.2878, "0.7": 392.7571, "2:4": 102.7409},
}
KL = {"0.5": 0.3698, "0.6": 0.5874, "0.7": 0.9277, "2:4": 0.6415}
HASH = "0f2bb4c1542585355004eddd5f7cf640ad7563fcc3e086e3c28ffe2fe53fdf35"
EVIL = "x</title><script>alert(1)</script><img src=http://evil.example/a.png onerror='b()'>\"`|](javascript:c) $\\frac"
VOID = {"meta", "link", "br", "img", "hr", "input", "image", "use"}


def quality():
    rows = [{"level": "dense", "method": "dense", "perplexity": 21.9757, "kl": 0.0, "bytes": 1}]
    for method, values in PERPLEXITY.items():
        for level, value in values.items():
            kl = KL[level] if method == "elastic" else None
            rows.append({"level": level, "method": method, "perplexity": value, "kl": kl, "bytes": 1})
    text = {"text": "wikitext2-test.raw.txt", "sha256": HASH, "windows": [147, 2048], "precision": "bfloat16"}
    return {"protocol": text, "rows": rows}


def with_record(folder, **changes):
    """Adds records to a copied checkpoint, which stays valid: its digest covers none of them."""
    ElasticCheckpoint(folder).update_record(changes)
    return folder


def results(folder, **changes):
    """What `eval --output` writes of a checkpoint. Args: changes: of every row."""
    checkpoint = ElasticCheckpoint(folder)
    origin = {"checkpoint_id": checkpoint.manifest.checkpoint_id, "date": "2026-11-27", "device": "a CPU, 2 threads"}
    levels = [level.name for level in checkpoint.ladder.levels]
    protocol = {"text": "news.txt", "sha256": HASH, "windows": [3, 256], "precision": "float32", "reference": "base"}
    rows = [
        {"level": level, "method": "elastic", "perplexity": 40.5 + i, "kl": 0.125 * i, "bytes": 1, **origin, **changes}
        for i, level in enumerate(levels)
    ]
    scores = [
        {"level": level, "method": "elastic", "task": task, "metric": metric, "value": value - 0.02 * i, "error": 0.011,
         "num_documents": 1838, "metrics": {}, "sha256": "0" * 16, **origin, **changes}
        for i, level in enumerate(levels)
        for task, metric, value in (("piqa", "acc_norm", 0.612), ("boolq", "acc", 0.55))
    ]  # fmt: skip
    tasks = {"lm_eval": "0.4.13", "documents": "all", "precision": "float32", "seed": 0}
    return {"model": "c", "protocol": protocol, "rows": rows, "zero_shot": {"protocol": tasks, "rows": scores}}


def hostile_record(folder):
    """Every text that a record may hold is hostile."""
    made = {
        "base_model": {"id": EVIL, "sha256": EVIL},
        "recipe": {EVIL: {EVIL: EVIL}, "seed": EVIL, "calibration": {"source": EVIL}},
        "versions": {EVIL: EVIL},
        "data": {"calibration_sha256": EVIL, "calibration_tokens": EVIL},
        "resolved": {"precision": EVIL, "trainable": EVIL},
        "training": {"block_losses": [{EVIL: 0.5, "0.5": 0.25}] * 2, "end_to_end_kl": {EVIL: 0.5}},
        "quality": {
            "protocol": {EVIL: EVIL, "text": EVIL, "windows": [EVIL, 3]},
            "rows": [{"level": level, "method": EVIL, "perplexity": 3.0, "kl": 0.1} for level in ("0.5", EVIL)],
        },
    }
    (folder / "config.json").write_text(json.dumps({"model_type": EVIL, "license": EVIL}))
    return with_record(folder, **made)


class Page(HTMLParser):
    """A page as a strict reader: text, tags with attributes, and whatever is not balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.problems, self.words = [], [], [], []
        self.feed(text)
        self.close()
        self.problems += [f"{tag} stays open" for tag in self.open]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"{tag} ends at {self.getpos()}")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
