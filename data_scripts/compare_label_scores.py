"""Compare the ways to score a label of several tokens, on zero-shot and ICL alone: what the default was chosen from.

    make smollm2
    MINICPT_DATA=folder python data_scripts/compare_label_scores.py        writes assets/reference_label_scores.csv

Nothing is trained, and the seeds are the tuning ones, which no table uses. All three rules come from one pass. Texts
are cut to 48 tokens where a task has long ones, so that a laptop finishes in minutes.
"""

import argparse

import pandas as pd
import torch
from tqdm import tqdm

from minicpt import fit, load_base, load_task, make_split
from minicpt.data import ASSETS, Split
from minicpt.engine.scores import (
    CONTENT_FREE,
    LABEL_SCORES,
    accuracy,
    calibrate,
    label_token_scores,
    reduce_tokens,
)
from minicpt.errors import print_any_text
from minicpt.lab.store import write_atomically

SEEDS = range(100, 103)
LONGEST_TEXT = 48  # tokens


def rows_of(base, split: Split, method: str) -> list[dict]:
    """Accuracy, and the share of the most frequent answer, by each rule, raw and calibrated."""
    predictor = fit(method, base, split, text_tokens=LONGEST_TEXT)
    texts = [text for text, _ in split.queries]
    queries = predictor.encode_queries([*texts, *CONTENT_FREE])
    tokens = label_token_scores(base.model, predictor.prefix, queries, predictor.candidates, 16)
    truth = [split.classes.index(label) for _, label in split.queries]
    lengths = [len(ids) for ids in predictor.candidates]
    rows = []
    for how in LABEL_SCORES:
        scores = reduce_tokens(tokens, how)
        raw, content_free = scores[: len(texts)], scores[len(texts) :]
        for kind, values in (("raw", raw), ("calibrated", calibrate(raw, content_free))):
            most = torch.bincount(values.argmax(-1)).max().item() / len(texts)
            rows.append(
                {
                    "dataset": split.task,
                    "method": method,
                    "shots": len(split.shots),
                    "seed": split.seed,
                    "longest_label": max(lengths),
                    "label_score": how,
                    "kind": kind,
                    "accuracy": accuracy(values, truth),
                    "most_frequent_answer": most,
                }
            )
    return rows


def main() -> None:
    print_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--datasets", nargs="+", default=["sst2", "trec", "ag_news", "dbpedia"])
    parser.add_argument("--n-test", type=int, default=100)
    args = parser.parse_args()
    base, found = load_base(args.model), []
    plan = [(d, seed, k) for d in args.datasets for seed in SEEDS for k in (0, 4)]
    for dataset, seed, shots in tqdm(plan, unit="cell"):
        split = make_split(load_task(dataset, "real"), shots, seed, args.n_test)
        # labels of one token: the rules are one and the same, which is a check of them
        found += rows_of(base, split, "icl" if shots else "zero")
    table = pd.DataFrame(found)
    path = ASSETS / "reference_label_scores.csv"
    write_atomically(path, table.to_csv(index=False, float_format="%.4f"))
    means = table.groupby(["dataset", "method", "kind", "label_score"], sort=False).accuracy.mean()
    print((100 * means).round(1).unstack().to_string())
    print(f"{path} written.")


if __name__ == "__main__":
    main()
