"""Small tasks that a tiny model learns in seconds, as files of each format."""

import csv
import json
import random
import re
from pathlib import Path

GOOD, BAD = ("a warm and funny film", "splendid acting", "I loved it"), ("a dull and empty film", "wooden acting", "I left early")
NAMES = {"PER": ("Anna Berg", "Tom Lind", "Eva Holm"), "LOC": ("Oslo", "New Town", "Paris")}
FRAMES = ("yesterday {PER} went to {LOC} by train", "in {LOC} it rains , says {PER}", "{PER} likes {LOC}")
ENGLISH = {"one": "eins", "two": "zwei", "three": "drei", "red": "rot", "blue": "blau", "green": "grün"}
SENTENCES = [*GOOD, *BAD, *(f.format(PER=p, LOC=place) for f in FRAMES for p in NAMES["PER"] for place in NAMES["LOC"])] * 3 + [
    *ENGLISH,
    *ENGLISH.values(),
]

# Flags of a quick run on the CPU.
QUICK = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "learning_rate": 5e-3,
    "num_train_epochs": 6,
    "tokens_per_batch": 80,
    "max_seq_length": 32,
}


def run_card(folder):
    """Runs the Python of a model card as it stands there, with its folder's path; returns what it defined."""
    code = re.search(r"```python\n(.*?)```", (Path(folder) / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    names = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    return names


def reviews(path, count=48, seed=0):
    """A tsv of sentences with the labels 0 and 1."""
    drawn = random.Random(seed)
    rows = [(drawn.choice(GOOD if label else BAD) + " !" * drawn.randrange(4), label) for label in (i % 2 for i in range(count))]
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return str(path)


def csv_file(path, header, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def jsonl_file(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def named_entities(path, count=40, seed=0, scheme="BIO"):
    """A CoNLL file of sentences with persons and places, in BIO or IOB1."""
    drawn, blocks = random.Random(seed), []
    for _ in range(count):
        lines = []
        for word in drawn.choice(FRAMES).split():
            kind = word.strip("{}")
            inside = drawn.choice(NAMES[kind]).split() if kind in NAMES else [word]
            for place, token in enumerate(inside):
                prefix = "B" if place == 0 and scheme == "BIO" else "I"
                lines.append(f"{token} {f'{prefix}-{kind}' if kind in NAMES else 'O'}")
        blocks.append("\n".join(lines))
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return str(path)


def questions(path, count=24, seed=0, without_answer=0):
    """A file in SQuAD's layout: who went where; some questions of a name that the context lacks."""
    drawn, paragraphs = random.Random(seed), []
    for number in range(count):
        person, place = drawn.choice(NAMES["PER"]), drawn.choice(NAMES["LOC"])
        context = FRAMES[0].format(PER=person, LOC=place)
        answers = [] if number < without_answer else [{"text": place, "answer_start": context.index(place)}]
        asked = "in Rome ?" if number < without_answer else "went to ?"
        question = {"id": f"q{number}", "question": asked, "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": context, "qas": [question]})
    path.write_text(json.dumps({"version": "2.0", "data": [{"title": "trips", "paragraphs": paragraphs}]}), encoding="utf-8")
    return str(path)


def translations(stem, count=60, seed=0):
    """Two files, ``stem.en`` and ``stem.de``, of number and colour words."""
    drawn = random.Random(seed)
    pairs = [[drawn.choice(list(ENGLISH)) for _ in range(drawn.randrange(1, 4))] for _ in range(count)]
    for suffix, words in (("en", lambda w: w), ("de", ENGLISH.get)):
        lines = [" ".join(map(words, pair)) for pair in pairs]
        stem.with_name(f"{stem.name}.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(stem)
