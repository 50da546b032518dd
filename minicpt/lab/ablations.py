"""The experiments nobody has reported: CPT with one decision changed at a time, on the same splits.

    python -m minicpt ablations --seeds 10 --workers 2

A variant is a method with other hyper-parameters, so its cells live in a store like all others and are computed once.
`compare` pairs every variant with plain CPT seed by seed; `copy_probe` asks how much of Set Classification is copying.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from ..data import load_task, make_split
from ..errors import MiniCPTError, unknown
from ..methods.registry import hyperparameters
from . import cells
from .cells import Cell
from .statistics import holm, interval, signed
from .store import Store, write_atomically
from .tables import pipes

PROBE_TASK = "set_cls"  # its texts are content words alone, so that a shared word means something


@dataclass(frozen=True)
class Variant:
    """A method with other hyper-parameters, the question it answers, and the variant it differs from in one thing."""

    question: str
    method: str
    meaning: str
    hp: dict = field(default_factory=dict)
    against: str = "cpt"


def variants(model: str = "micro") -> dict[str, Variant]:
    """All variants by name, in reading order; radii are in the unit of CPT's own on that model."""
    cpt = hyperparameters("cpt", model)
    ball = {name: cpt[name] for name in ("epsilon", "epsilon_unit")}

    def changed(question: str, meaning: str, **hp) -> Variant:
        return Variant(question, "cpt", meaning, hp)

    words = {"init": "SAMPLE_VOCAB"}
    return {
        "cpt": Variant(
            "reference",
            "cpt",
            f"epsilon {cpt['epsilon']} ({cpt['epsilon_unit']}), decay {cpt['decay']}",
        ),
        "icl": Variant("reference", "icl", "the context as it is, nothing trained"),
        # is it the projection?
        "no_projection": changed(
            "projection", "no ball: tokens go where the gradient takes them", projection="none"
        ),
        "one_ball": changed(
            "projection",
            "one ball for the whole delta, radius sqrt(sum of squares)",
            projection="together",
        ),
        "pt": Variant("projection", "pt", "PT as tuned"),
        "pt_ball": Variant(
            "projection", "pt", "PT with CPT's ball around each token's start", ball, "pt"
        ),
        "ipt": Variant("projection", "ipt", "IPT as tuned"),
        "ipt_ball": Variant(
            "projection", "ipt", "IPT with CPT's ball around each token's start", ball, "ipt"
        ),
        "ipt_words": Variant("projection", "ipt", "IPT started from words", words, "ipt"),
        "ipt_words_ball": Variant(
            "projection",
            "ipt",
            "IPT started from words, with CPT's ball",
            {**words, **ball},
            "ipt_words",
        ),
        **{
            f"epsilon_{e:g}": changed(
                "epsilon", f"radius {e:g} for inputs and templates", epsilon=e, epsilon_format=e
            )
            for e in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
        },
        "epsilon_paper": Variant("epsilon", "cpt_paper_eps", "the paper's radius in PEFT's unit"),
        "train_label": changed("loss", "the training label alone", context_weight=0.0),
        "one_label": changed(
            "loss", "the training label and one random context label", context_labels="one"
        ),
        "decay_0.99": changed("decay", "decay 0.99", decay=0.99),
        "decay_0.5": changed("decay", "decay 0.5", decay=0.5),
        "decay_none": changed("decay", "no decay: all labels count alike", decay=1.0),
        "input_only": changed("updated tokens", "inputs alone", roles="input"),
        "templates_only": changed("updated tokens", "templates alone", roles="template"),
        "labels_too": changed("updated tokens", "labels not frozen", roles="template+input+label"),
        "all_tokens": changed(
            "updated tokens", "everything, separators and labels too", roles="all"
        ),
        "loo": changed(
            "leave-one-out",
            "the training example does not see its twin in the context",
            leave_one_out=True,
        ),
        "loo_train_label": Variant(
            "leave-one-out",
            "cpt",
            "the same, training label alone",
            {"leave_one_out": True, "context_weight": 0.0},
            "train_label",
        ),
        "dropout": changed(
            "leave-one-out", "each step hides 5 % of the context", token_dropout=0.05
        ),
        "ct_prompt": Variant("Context Tuning", "ct_prompt", "CT-Prompt as tuned"),
        "ct_prompt_twin": Variant(
            "Context Tuning",
            "ct_prompt",
            "CT-Prompt without leave-one-out",
            {"leave_one_out": False},
            "ct_prompt",
        ),
        "ct_kv": Variant("Context Tuning", "ct_kv", "CT-KV as tuned"),
        "ct_kv_twin": Variant(
            "Context Tuning",
            "ct_kv",
            "CT-KV without leave-one-out",
            {"leave_one_out": False},
            "ct_kv",
        ),
        "ct_kv_no_dropout": Variant(
            "Context Tuning",
            "ct_kv",
            "CT-KV without token dropout",
            {"token_dropout": 0.0},
            "ct_kv",
        ),
        "cpt_instr": Variant(
            "instruction", "cpt_instr", "CPT†: instruction in front, updated like a template"
        ),
        "instr_frozen": Variant(
            "instruction",
            "cpt_instr",
            "instruction in front, frozen",
            {"roles": "template+input"},
            "cpt_instr",
        ),
        "instr_only": Variant(
            "instruction",
            "cpt_instr",
            "the instruction alone is updated",
            {"roles": "instruction"},
            "cpt_instr",
        ),
        "icl_instr": Variant(
            "instruction",
            "cpt_instr",
            "instruction in front, nothing trained (radius 0)",
            {"epsilon": 0.0, "epsilon_format": 0.0, "epochs": 1},
            "icl",
        ),
    }


def grid(
    names: Iterable[str] = (),
    datasets: Iterable[str] = (),
    shots: Iterable[int] = (4,),
    seeds: Iterable[int] = range(10),
    **kwargs,
) -> dict[str, list[Cell]]:
    """The cells of the named variants (none named: all) and of those they are compared with, by variant."""
    known = variants(kwargs.get("model", "micro"))
    wanted = {"cpt"}
    for name in names or known:
        if name not in known:
            raise unknown("variant", name, known)
        wanted |= {name, known[name].against}
    shots, seeds = list(shots), list(seeds)
    return {
        name: cells.grid(datasets, [v.method], shots, seeds, hp=tuple(v.hp.items()), **kwargs)
        for name, v in known.items()
        if name in wanted
    }


def collect(cells: dict[str, list[Cell]], store: Store) -> dict[str, list[dict]]:
    """The results of every variant that is complete. Raises `MiniCPTError` without those of plain CPT."""
    results = {name: [store.get(cell) for cell in group] for name, group in cells.items()}
    complete = {name: group for name, group in results.items() if all(group)}
    if "cpt" not in complete:
        raise MiniCPTError(
            "Plain CPT is incomplete in this store, and every variant is compared with it: see the "
            "*.error.json files, or run the same command again."
        )
    return complete


def compare(results: dict[str, list[dict]]) -> pd.DataFrame:
    """One row a variant, in percent and percentage points, paired over the seeds.

    Columns: question, variant, meaning, a column a dataset, mean, difference (to plain CPT), ci_low, ci_high, p
    (paired t test), holm (p adjusted for all variants of the table), against, gap, gap_low, gap_high (the same
    difference to the variant named in `against`, where that is not CPT), n. Tasks and shots are averaged within a
    seed first. Raises `MiniCPTError` if two variants saw different splits.
    """
    model = results["cpt"][0]["config"]["model"]
    known, place = variants(model), ("dataset", "labels", "shots", "seed")
    splits: dict[tuple, str] = {}
    for name, group in results.items():
        for result in group:
            key = tuple(result["config"][k] for k in place)
            if splits.setdefault(key, result["split_sha256"]) != result["split_sha256"]:
                raise MiniCPTError(
                    f"{name} saw another split than the others at {key}: recompute the older results."
                )
    table = pd.DataFrame(
        [
            {"variant": name, **{k: r["config"][k] for k in place}, "accuracy": 100 * r["accuracy"]}
            for name, group in results.items()
            for r in group
        ]
    )
    by_task = table.groupby(["variant", "seed", "dataset"], sort=False).accuracy.mean().unstack()
    by_task = by_task[list(dict.fromkeys(table.dataset))]
    by_seed = by_task.mean(axis=1).unstack()  # variant, seed
    rows = []
    for name in (name for name in known if name in results):
        v, difference = known[name], (by_seed.loc[name] - by_seed.loc["cpt"]).to_numpy()
        against = v.against if v.against != "cpt" and v.against in results else ""
        gap = interval(by_seed.loc[name] - by_seed.loc[against]) if against else (np.nan,) * 4
        mean, _, low, high = interval(difference)
        p = (
            stats.ttest_1samp(difference, 0).pvalue if np.ptp(difference) else float(mean == 0)
        )  # 1: the same thing
        p = np.nan if name == "cpt" or len(difference) == 1 else p
        rows.append(
            {
                "question": v.question,
                "variant": name,
                "meaning": v.meaning,
                **by_task.loc[name].mean(),
                "mean": by_seed.loc[name].mean(),
                "difference": mean,
                "ci_low": low,
                "ci_high": high,
                "p": p,
                "against": against,
                "gap": gap[0],
                "gap_low": gap[2],
                "gap_high": gap[3],
                "n": len(difference),
            }
        )
    result = pd.DataFrame(rows)
    result.insert(result.columns.get_loc("p") + 1, "holm", holm(result.p))
    return result


def reading(table: pd.DataFrame) -> list[str]:
    """What the table says, in sentences made from its numbers."""
    others = table[table.variant != "cpt"]
    sure, misses_0 = others[others.holm < 0.05], (others.ci_low > 0) | (others.ci_high < 0)
    lone = others[misses_0].drop(sure.index, errors="ignore")

    def listed(rows: pd.DataFrame) -> str:
        rows = rows.sort_values("difference")
        return ", ".join(f"{r.variant} ({r.difference:+.1f})" for r in rows.itertuples()) or "none"

    return [
        f"Lower than plain CPT, also after Holm's correction for {len(others)} comparisons: "
        f"{listed(sure[sure.difference < 0])}.",
        f"Higher than plain CPT after that correction: {listed(sure[sure.difference > 0])}.",
        f"Interval without 0, but not after the correction (of {len(others)} intervals about {0.05 * len(others):.0f} "
        f"would miss 0 by chance): {listed(lone)}.",
        f"Not separable from plain CPT: {listed(others.drop([*sure.index, *lone.index]))}.",
    ]


# ---- the copy probe -------------------------------------------------------------------------------------------------


def copy_probe(results: dict[str, list[dict]]) -> pd.DataFrame:
    """Accuracy (percent) on queries with and without a word of the context, a row a variant; "copy" copies only.

    Columns: variant, all, shared, new (means over seeds), shared_minus_icl and new_minus_icl with their intervals as
    text, queries_shared (share of the queries with a word of the context). "copy" answers with the label of the
    example that shares most words with the query, and guesses among the context's labels where none or several do.
    Empty without results of the embedded PROBE_TASK.
    """
    rows = []
    task = load_task(PROBE_TASK)
    for name, group in results.items():
        for result in (r for r in group if r["config"]["task_sha256"] == task.sha256):
            config = result["config"]
            split = make_split(
                task,
                config["shots"],
                config["seed"],
                config["n_test"],
                config["labels"],
                config["per_class"],
            )
            if split.sha256 != result["split_sha256"]:
                raise MiniCPTError(
                    f"The split of {name}, seed {config['seed']}, cannot be drawn again: recompute it."
                )
            overlap = np.array(
                [
                    [len({*query.split()} & {*text.split()}) for text, _ in split.shots]
                    for query, _ in split.queries
                ]
            )
            truth, shared = np.array(result["truth"]), overlap.any(axis=1)
            right = {name: np.argmax(result["log_scores"], axis=1) == truth}
            if name == "icl":
                labels = np.array([split.classes.index(label) for _, label in split.shots])
                best = overlap == overlap.max(
                    axis=1, keepdims=True
                )  # all of them where nothing is shared
                right["copy"] = (best * (labels == truth[:, None])).sum(axis=1) / best.sum(axis=1)
            rows += [
                {
                    "variant": variant,
                    "seed": config["seed"],
                    "all": hits.mean(),
                    "shared": hits[shared].mean(),
                    "new": hits[~shared].mean(),
                    "queries_shared": shared.mean(),
                }
                for variant, hits in right.items()
            ]
    if not rows:
        return pd.DataFrame()
    by_seed = 100 * pd.DataFrame(rows).groupby(["variant", "seed"], sort=False).mean()
    table = by_seed.groupby("variant", sort=False).mean()
    for part in ("shared", "new") if "icl" in table.index else ():
        gaps = by_seed[part].unstack() - by_seed.loc["icl", part]
        intervals = [interval(gaps.loc[name]) for name in table.index]
        table[f"{part}_minus_icl"] = [signed(mean, low, high) for mean, _, low, high in intervals]
    return table.reset_index()


def twin_losses(results: dict[str, list[dict]]) -> dict[str, float]:
    """Cross-entropy of a label before any training: its example in the context, hidden there, and a real query's."""
    found = {
        what: [r["history"]["loss"][0] for r in results.get(name, [])]
        for what, name in (("twin visible", "train_label"), ("twin hidden", "loo_train_label"))
    }
    icl = results.get("icl", [])
    found["a query"] = [
        -np.mean([row[t] for row, t in zip(r["log_scores"], r["truth"])]) for r in icl
    ]
    return {what: float(np.mean(values)) for what, values in found.items() if values}


# ---- files ----------------------------------------------------------------------------------------------------------


def rows_to_read(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the comparison as people read them; bold: separable after Holm's correction."""
    rows = []
    for row in table.to_dict("records"):
        gap = (
            signed(row["difference"], row["ci_low"], row["ci_high"])
            if row["variant"] != "cpt"
            else ""
        )
        own = signed(row["gap"], row["gap_low"], row["gap_high"])
        rows.append(
            [
                row["question"],
                row["variant"],
                row["meaning"],
                f"{row['mean']:.1f}",
                f"**{gap}**" if row["holm"] < 0.05 else gap,
                own and f"{row['against']}: {own}",
            ]
        )
    return [
        "question",
        "variant",
        "what it is",
        "mean",
        "minus CPT [95 %]",
        "minus its own baseline",
    ], rows


def to_markdown(
    table: pd.DataFrame, probe: pd.DataFrame, losses: dict[str, float], title: str
) -> str:
    """The comparison, its reading and the copy probe in Markdown."""
    parts = [
        f"# {title}",
        f"Mean accuracy in percent over tasks and shots; differences in points, paired over "
        f"{table.n.max()} seeds; bold: separable from plain CPT after Holm's correction.",
        pipes(*rows_to_read(table)),
        *reading(table),
    ]
    if len(probe):
        parts += [
            f"## Copy probe ({PROBE_TASK})",
            "Queries with a word of the context (`shared`) and without (`new`).",
            pipes(probe.columns, probe.round(1).to_numpy()),
        ]
    if losses:
        said = ", ".join(f"{what} {value:.2f}" for what, value in losses.items())
        parts += [f"Mean cross-entropy of a label before training: {said}."]
    return "\n\n".join(parts) + "\n"


def write(results: dict[str, list[dict]], folder: str | Path, title: str) -> dict[str, Path]:
    """Write ablations.csv, copy_probe.csv, ablations.md and ablations.png; return their paths."""
    from ..pictures import save
    from .figures import difference_to_cpt

    folder, table, probe = Path(folder), compare(results), copy_probe(results)
    text = to_markdown(table, probe, twin_losses(results), title)
    files = {"ablations.csv": table.to_csv(index=False, float_format="%.4f"), "ablations.md": text}
    if len(probe):
        files["copy_probe.csv"] = probe.to_csv(index=False, float_format="%.4f")
    for name, content in files.items():
        write_atomically(folder / name, content)
    figure = save(difference_to_cpt(table), folder / "ablations.png")
    return {**{name: folder / name for name in files}, "figure": figure}
