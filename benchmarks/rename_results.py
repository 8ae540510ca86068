"""Give every committed result the name of the method that it measured.

For a time, methods without any auxiliary network were options of the rule `glcan`, then its default, and their rows
were called `glcan:4`. That name stands for local learning with auxiliary networks alone. Each row gets its own name:

    glcan:K          local learning with auxiliary networks; keeps its name
    glcan:K+joint    the same, and a share of each batch beside it that trains all blocks end to end (weight below 1)
    share:K          no auxiliary networks: a fixed share of each batch, the first images, is back-propagated; the last
                     block learns from all of it
    selective:K      no auxiliary networks: as share, but the images are chosen by their gradients (form with K blocks)

Suffixes such as `+start` and `+accumulate:4` stay. A renamed row gets `renamed_from` and, where it has one, its
`share`; no number is changed. What says how a run was started (`command`, `config`) is kept as it was, because a
checkout of that commit knows no other name. How it is decided: by the options of the row (`joint`, `joint_weight`,
`joint_by`), whether it has auxiliary parameters, and, where it was trained with the defaults of its day, by `KNOWN`
below, from the commits, FLOPs and documents. Options or a table against the auxiliary parameters are an error.

Detection results are marked, too: they come from before `BoxAugmentation.visible` had any effect, when slivers of
objects were trained as whole ones. Row labels of the Markdown tables follow the JSON beside them.

    python benchmarks/rename_results.py          # prints one line for each renamed entry; the second time none
"""

import argparse
import fnmatch
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

#: Marks what was trained or measured on augmented boxes.
BOXES = "before the box augmentation was mended (visible had no effect)"
BOX_FILES = (
    "scenes*",
    "localbench/detection/*",
    "localbench/ablation-detection/*",
    "pilots_detection.json",
    "pilots_joint_detection.json",
)

#: What a row is called by, and what a name of old looks like: `glcan:4+finish`, `glcan-4`, `glcan, K = 4`.
NAME_KEYS = ("name", "method", "entry", "what", "rule")
OLD = re.compile(r"glcan(?:[:-]|, K = )(?P<blocks>\d+)(?P<suffixes>(?:\+(?!joint)\w+(?::\d+)?)*)(?P<extra>,.*)?")
OLD_PLANNED = re.compile(r"glcan, (?P<blocks>\d+) blocks(?P<suffixes>)(?P<extra>)")
#: Parts of an old label that the new name says.
SAID = re.compile(r"joint(_by|_weight)?=|no local learning")

#: Sentences that name a method, and keys that hold more than a name.
TEXTS = {
    "when glcan trained for 417 of them. At the second commit glcan was trained again": (
        "when share:4 (then called glcan:4) trained for 417 of them. At the second commit it was trained again"
    ),
    "weights of a trained run (glcan:4, seed 1,": "weights of a trained run (selective:4, seed 1,",
}
KEYS = {
    "profile of glcan:4, fp32": "profile of share:4, fp32",
    "order": "share:4",
    "gradient": "selective:4",
}
KEYS_IN = ("step_times.json", "steps_detection_chosen.json")

LEGEND = {
    "share": "share:K (s): a fixed share s of each batch, the first images, is back-propagated; the last block learns "
    "from all of it. No auxiliary networks.",
    "selective": "selective:K: half of each batch, chosen by its gradients, is back-propagated; the last block learns "
    "from all of it. No auxiliary networks. This is the form with K blocks.",
    "+joint": "glcan:K+joint (s): local learning with auxiliary networks, beside a share s of each batch that trains "
    "all blocks end to end (an addition that is no longer there).",
}


@dataclass(frozen=True)
class Nature:
    """What a row measured: the family of its method, and the share of a batch that goes through all blocks at once."""

    family: str
    share: float | None = None

    @property
    def has_auxiliary(self) -> bool:
        """Whether the method builds auxiliary networks."""
        return self.family.startswith("glcan")

    def name(self, blocks: int, rest: str = "") -> str:
        """The method's name, `rest` its suffixes: `glcan:4+joint+accumulate:2`."""
        base, _, joint = self.family.partition("+")
        return f"{base}:{blocks}{'+joint' if joint else ''}{rest}"


LOCAL = Nature("glcan")
CHOSEN = Nature("selective", 0.5)

#: (file, name or section, nature) of rows that were trained with the defaults of their day; the first that fits counts.
#: Defaults, by commit: classification with up to four blocks 705a278 a quarter joint, a150699 seven eighths alone,
#: dfda632 chosen; with more blocks d862a08 three quarters alone, 7d4d2f6 chosen; detection eb76800 a quarter joint,
#: d862a08 three quarters alone; super-resolution 56abbdc a third alone, 77d34f7 a half.
KNOWN: tuple[tuple[str, str, Nature], ...] = (
    # four parts of 32 images were too small for joint images (42.72 GFLOPs, as without them)
    ("fashion_mnist_resnet32_bf16/*", "glcan:4+accumulate:4", LOCAL),
    ("fashion_mnist_resnet32_bf16/comparison_without_joint_images.json", "*", LOCAL),
    ("fashion_mnist_resnet32_bf16/comparison_joint_k4.json", "glcan:16", LOCAL),
    ("fashion_mnist_resnet32_bf16/block_losses.json", "*", LOCAL),  # the losses of comparison_without_joint_images.json
    ("fashion_mnist_resnet32_bf16/comparison*.json", "glcan:4", Nature("glcan+joint", 0.25)),  # 42.11 GFLOPs
    ("fashion_mnist_resnet32_bf16*/comparison.json", "glcan:16", Nature("share", 0.75)),
    ("fashion_mnist_resnet32_bf16_seeds/comparison.json", "glcan:4", Nature("glcan+joint", 0.25)),
    ("fashion_mnist_resnet32_bf16_seeds/chosen_k*.json", "*", CHOSEN),
    ("fashion_mnist_resnet32_bf16_seeds/finish_goes_on.json", "glcan:4*", Nature("share", 0.875)),
    ("fashion_mnist_resnet32_bf16_seeds/finish_goes_on.json", "glcan:16*", Nature("share", 0.75)),
    ("fashion_mnist_resnet32_bf16_seeds/joint_875*.json", "*", Nature("share", 0.875)),
    ("fashion_mnist_resnet32_bf16_seeds/other_machine.json", "glcan, K = 4", Nature("glcan+joint", 0.25)),
    ("fashion_mnist_resnet32_gpu.json", "glcan:4", Nature("glcan+joint", 0.25)),  # losses of all four blocks
    ("fashion_mnist_resnet32_gpu.json", "glcan:16", Nature("share", 0.75)),  # a loss of the last block alone
    ("fashion_mnist_resnet32_steps.json", "glcan:4+accumulate:4", LOCAL),
    ("fashion_mnist_resnet32_steps.json", "glcan:4", Nature("share", 0.875)),
    ("fashion_mnist_resnet32_steps.json", "glcan:16", Nature("share", 0.75)),
    ("fashion_mnist_resnet32_steps_chosen.json", "glcan:4", Nature("share", 0.875)),  # 44.73 GFLOPs, as in steps.json
    ("fashion_mnist_resnet32_steps_chosen.json", "glcan:16, joint=0.25", Nature("selective", 0.25)),
    ("fashion_mnist_resnet32_steps_chosen.json", "glcan:16, joint_by=order", Nature("share", 0.75)),
    ("fashion_mnist_resnet32_steps_chosen.json", "*", CHOSEN),
    ("compare_defaults.json", "/super-resolution*", Nature("share", 0.5)),
    ("compare_defaults.json", "/detection*", Nature("share", 0.75)),
    ("scenes_fcos_small/comparison_joint_25.json", "*", Nature("glcan+joint", 0.25)),
    ("scenes_fcos_small/comparison_without_joint_images.json", "*", LOCAL),
    ("scenes_fcos_small_chosen.json", "*", CHOSEN),
    ("photographs_edsr_small/comparison_joint_33.json", "*", Nature("share", 0.33)),
    ("photographs_edsr_small/comparison_without_joint_images.json", "*", LOCAL),
    # ResNet-32 of f18fc53 ... 5248344, when classification had no joint images yet, and fcos_small, which had a quarter
    ("step_times.json", "/runs/[56]*", Nature("glcan+joint", 0.25)),
    ("step_times.json", "/runs/*", LOCAL),
    ("step_times.json", "/gpu*", Nature("share", 0.75)),
    ("pilots_joint_detection.json", "*: the default", Nature("share", 0.75)),
    # from before there were joint images
    ("pilots_auxiliary_networks.json", "*", LOCAL),
    ("pilots_cuts.json", "*", LOCAL),
    ("pilots_detection.json", "*", LOCAL),
    ("pilots_finish.json", "*", LOCAL),
    ("pilots_learning_rates.json", "*", LOCAL),
    ("pilots_local_branch.json", "*", LOCAL),
    ("pilots_start.json", "*", LOCAL),
    ("plan_accuracy_cpu.json", "*", LOCAL),
    ("fashion_mnist_resnet32/*", "*", LOCAL),
    ("fashion_mnist_resnet32_20000/*", "*", LOCAL),
    ("fashion_mnist_resnet32_start/*", "*", LOCAL),
)

#: Files that name their method in the command alone.
ADDED = {"fashion_mnist_resnet32_bf16_seeds/joint_875_finish.json": ("share:4+finish", "glcan:4+finish", 0.875)}


class Undecided(Exception):
    """Nothing says what a row was."""


class Renamer:
    """Renames the rows of one file; `changes` has a line for each."""

    def __init__(self, file: str, content: Any) -> None:
        self.file = file
        self.content = content
        self.changes: list[str] = []

    def run(self) -> Any:
        """The content with new names."""
        if self.file.startswith("localbench/") and isinstance(self.content, dict):
            content = self._localbench(self.content)
        else:
            top = self.content if isinstance(self.content, dict) else {}
            content = self._visit(self.content, "", {"config": top.get("config", {})})
        if self.file in ADDED and "method" not in content:
            name, old, share = ADDED[self.file]
            content = {"method": name, "renamed_from": old, "share": share} | content
            self._say("", old, name)
        return self._marked(content)

    def _say(self, where: str, old: str, new: str) -> None:
        self.changes.append(f"{self.file}{':' + where if where else ''}: {old} -> {new}")

    def _visit(self, node: Any, where: str, above: dict[str, Any]) -> Any:
        if isinstance(node, list):
            return [self._visit(item, f"{where}/{index}", above) for index, item in enumerate(node)]
        if isinstance(node, str):
            for old, new in TEXTS.items():
                if old in node:
                    self._say(where, old, new)
                    node = node.replace(old, new)
            return node
        if not isinstance(node, dict):
            return node
        facts = above | {key: value for key, value in node.items() if not isinstance(value, list)}
        facts.pop("name", None)
        result: dict[str, Any] = {}
        for key, value in self._named(node, where, facts):
            if key in ("command", "config", "environment"):
                result[key] = value
                continue
            new, nature = self._key(key, value, where, facts)
            value = self._visit(value, f"{where}/{key}", facts)
            if new != key:
                if new in node or new in result:
                    raise ValueError(f"{self.file}:{where}: two entries would be called {new}.")
                if isinstance(value, dict):
                    value = {"renamed_from": key, **_share(nature), **value}
                else:
                    result.setdefault("renamed_from", {})[new] = key
            result[new] = value
        return result

    def _named(self, node: dict[str, Any], where: str, facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """The items of a dictionary, its own name renamed."""
        if "renamed_from" in node:
            yield from node.items()
            return
        blocks, done = _blocks(node), False
        for key, value in node.items():
            match = OLD.fullmatch(value) if isinstance(value, str) and key in NAME_KEYS else None
            if key == "rule" and value == "glcan" and str(node.get("command", "")).startswith("glcan plan"):
                nature = self._nature(f"glcan:{blocks}", where, facts)
                if nature != LOCAL:
                    yield from self._renamed("method", f"glcan:{blocks}", nature.name(blocks), nature, where)
                    continue
            elif match:
                nature = self._nature(value, where, facts)
                if nature != LOCAL:
                    yield from self._renamed(key, value, _label(nature, match), nature, where)
                    done = True
                    continue
            yield key, value
        settings = node.get("config")
        own = isinstance(settings, dict) and settings.get("rule") == "glcan" and "auxiliary_parameters" in node
        chosen = str(node.get("what", "")).startswith("joint_by=gradient")
        if not done and "method" not in node and blocks > 1 and (own or chosen):
            share = node.get("share", 0.5) if chosen else None
            nature = Nature("selective", share) if chosen else self._nature(f"glcan:{blocks}", where, facts)
            if nature != LOCAL:
                named = self._renamed("method", f"glcan:{blocks}", nature.name(blocks), nature, where)
                yield from ((key, value) for key, value in named if key not in node)

    def _renamed(self, key: str, old: str, new: str, nature: Nature, where: str) -> Iterator[tuple[str, Any]]:
        self._say(where, old, new)
        yield key, new
        yield "renamed_from", old
        yield from _share(nature).items()

    def _key(self, key: str, value: Any, where: str, facts: dict[str, Any]) -> tuple[str, Nature]:
        """The new name of a key, and what it stands for."""
        if self.file in KEYS_IN and key in KEYS:
            self._say(where, key, KEYS[key])
            return KEYS[key], LOCAL
        match = OLD.fullmatch(key) or OLD_PLANNED.fullmatch(key)
        if not match:
            return key, LOCAL
        own = value if isinstance(value, dict) else {}
        nature = self._nature(key, where, facts | {name: own[name] for name in own if name == "auxiliary_parameters"})
        if nature == LOCAL:
            return key, nature
        new = _label(nature, match)
        if key.startswith("glcan-"):
            new = new.replace(":", "-")  # the name of a run's folder
        self._say(where, key, new)
        return new, nature

    def _nature(self, name: str, where: str, facts: dict[str, Any]) -> Nature:
        """What a row was. Raises `Undecided` where nothing says so, `ValueError` where two sources do not agree."""
        auxiliary = facts.get("auxiliary_parameters")
        nature = self._known(name, where) or _from_options(name, facts) or self._by_cost(facts)
        if nature is None:
            raise Undecided(f"{self.file}:{where}: {name}")
        # runs with a weight of 1 whose networks were there all the same, and taught the blocks nothing
        patched = facts.get("patched") or self.file == "pilots_joint.json"
        if auxiliary is not None and nature.has_auxiliary != bool(auxiliary) and not patched:
            raise ValueError(f"{self.file}:{where}: {name} is {nature.family}, with {auxiliary} auxiliary parameters.")
        return nature

    def _known(self, name: str, where: str) -> Nature | None:
        for pattern, what, nature in KNOWN:
            about = where if what.startswith("/") else name
            if fnmatch.fnmatch(self.file, pattern) and fnmatch.fnmatch(about, what):
                return nature
        return None

    def _by_cost(self, facts: dict[str, Any]) -> Nature | None:
        """Of plans, timed steps and comparisons with the defaults: by the task, and whether there are networks."""
        if facts.get("auxiliary_parameters") is None:
            return Nature("share", 0.75) if self.file == "scenes_fcos_small_lr_0.004.json" else None
        if facts["auxiliary_parameters"]:
            return LOCAL
        task = facts.get("task") or facts.get("config", {}).get("task")
        model = str(facts.get("model", ""))
        if task == "super-resolution" or "edsr" in model or self.file.startswith("photographs"):
            return Nature("share", 0.5)
        if task == "detection" or "retinanet" in model or self.file.startswith("scenes"):
            # three quarters of two images are one
            return Nature("share", 0.5 if facts.get("batch") == 2 else 0.75)
        if task == "classification" or model.startswith(("torchvision/", "cifar_")):
            return CHOSEN
        return CHOSEN if self.file == "fashion_mnist_resnet32_gpu_chosen.json" else None

    def _localbench(self, content: dict[str, Any]) -> dict[str, Any]:
        if "rows" in content:
            bench = content["bench"]
            rows = [self._entry(row, bench, f"/rows/{index}") for index, row in enumerate(content["rows"])]
            return content | {"rows": rows}
        return self._entry(content, content["bench"], "") if content["config"].get("rule") == "glcan" else content

    def _entry(self, row: dict[str, Any], bench: str, where: str) -> dict[str, Any]:
        """A row of LocalBench, whose name says what differs from the default of the day, without the blocks."""
        old = str(row["entry"])
        ablation = bench.startswith("ablation") and old != "e2e"
        if "renamed_from" in row or ":" in old or not (old.startswith("glcan") or ablation):
            return row
        base, _, suffix = old.partition("+")
        extra = ""
        if base == "glcan":
            by_task = {"detection": Nature("share", 0.75), "super-resolution": Nature("share", 0.5)}
            nature = by_task.get(bench.removeprefix("ablation-"), CHOSEN)
        elif "first images joint" in old:
            nature = Nature("share", 0.875 if row["blocks"] <= 4 else 0.75)
        elif percent := re.fullmatch(r"joint images (\d+)%", old):
            nature = Nature("glcan+joint", int(percent[1]) / 100)
        elif "quarter joint" in old:
            nature = Nature("glcan+joint", 0.25)
        elif "without joint images" in old:
            nature = LOCAL
            extra = old.removesuffix("without joint images").removesuffix(", ").strip()
            extra = "" if extra in ("", "glcan") else f", {extra}"
        else:
            raise Undecided(f"{self.file}:{where}: {old}")
        if nature.has_auxiliary != bool(row["auxiliary_parameters"]):
            raise ValueError(f"{self.file}:{where}: {old} is {nature.family}, against its auxiliary parameters.")
        new = nature.name(row["blocks"], f"+{suffix}" if suffix else "") + extra
        result: dict[str, Any] = {}
        for key, value in row.items():
            result |= dict(self._renamed(key, old, new, nature, where)) if key == "entry" else {key: value}
        return result

    def _marked(self, content: Any) -> Any:
        """The content, what comes from augmented boxes with a note."""
        if any(fnmatch.fnmatch(self.file, pattern) for pattern in BOX_FILES):
            return self._noted(content, "")
        if self.file == "compare_defaults.json" or self.file == "gradient_agreement.json":
            for key in content:
                if key.startswith("detection"):
                    content[key] = self._noted(content[key], f"/{key}")
        elif self.file.startswith("pilots_"):
            for index, row in enumerate(content.get("runs", [])):
                if row.get("config", {}).get("data") == "scenes":
                    content["runs"][index] = self._noted(row, f"/runs/{index}")
        return content

    def _noted(self, node: dict[str, Any], where: str) -> dict[str, Any]:
        said = node.get("note", "")
        if BOXES in said:
            return node
        self.changes.append(f"{self.file}{':' + where if where else ''}: note: {BOXES}")
        return node | {"note": f"{said}; {BOXES}" if said else BOXES}


def _blocks(node: dict[str, Any]) -> int:
    """How many blocks a row says that it has; 0: it does not say."""
    settings = node.get("config")
    said = node.get("blocks") or (settings.get("blocks") if isinstance(settings, dict) else None)
    return said if isinstance(said, int) else 0


def _share(nature: Nature) -> dict[str, float]:
    return {} if nature.share is None else {"share": nature.share}


def _label(nature: Nature, match: re.Match[str]) -> str:
    """The new form of an old label: what the name now says is left out of it."""
    extra = match["extra"] or ""
    if SAID.search(extra):
        unusual = nature.family == "selective" and nature.share not in (None, 0.5)
        extra = f", {Fraction(nature.share or 0)}" if unusual else ""
    return nature.name(int(match["blocks"]), match["suffixes"]) + extra


def _from_options(name: str, facts: dict[str, Any]) -> Nature | None:
    """What the options of a row say, which stand beside its name, in its settings, or in the name itself."""
    options = facts.get("config", {}).get("rule_options", {}) | facts.get("rule_options", {})
    options = options | {key: facts[key] for key in ("joint", "joint_weight", "joint_by") if key in facts}
    options = options | dict(re.findall(r"(joint\w*)=(\w+(?:\.\d+)?)", name))
    if options.get("joint_by") == "gradient":
        return Nature("selective", float(options.get("joint", 0.5)))
    if options.get("joint_by") == "order":
        return Nature("share", float(options.get("joint", 0.875)))  # of four blocks
    if "joint" not in options:
        return None
    share, weight = float(options["joint"]), options.get("joint_weight")
    if not share:
        return LOCAL
    alone = float(weight) == 1 if weight is not None else facts.get("auxiliary_parameters", 0) == 0 and share > 0.25
    return Nature("share" if alone else "glcan+joint", share)


def labels(content: Any) -> Iterator[tuple[str, str, str]]:
    """Old name, blocks and new label of each renamed row of a comparison or a LocalBench table."""
    for row in [*content.get("methods", []), *content.get("rows", [])]:
        if "renamed_from" in row:
            new = str(row.get("name") or row.get("entry"))
            share = row.get("share")
            usual = new.startswith("selective") and share == 0.5
            text = "" if share is None or usual else f" ({Fraction(share).limit_denominator(8)})"
            yield str(row["renamed_from"]), str(row["blocks"]), new + text


def relabelled(text: str, content: Any, note: bool) -> str:
    """A Markdown report with the row labels of the JSON beside it, and a line for each name that is not plain."""
    lines = text.split("\n")
    for old, blocks, new in labels(content):
        lines = [re.sub(rf"^\| {re.escape(old)} \| {blocks} \|", f"| {new} | {blocks} |", line) for line in lines]
    rows = [line for line in lines if line.startswith("| ")]
    said = [sentence for kind, sentence in LEGEND.items() if any(kind in row for row in rows)]
    if note:
        said.append(f"Measured {BOXES}.")
    missing = [f"- {sentence}" for sentence in said if sentence not in text]
    bullets = [index for index, line in enumerate(lines) if line.startswith(("- ", "| "))]
    if missing and bullets:
        last = bullets[-1]
        gap = [""] if lines[last].startswith("| ") else []
        lines[last + 1 : last + 1] = gap + missing
    return "\n".join(lines)


def written(content: Any, like: str) -> str:
    """JSON in the layout of the text that it comes from."""
    indent = 1 if like.startswith('{\n "') else 2
    plain = json.dumps(json.loads(like), indent=indent, ensure_ascii=False)
    return json.dumps(content, indent=indent, ensure_ascii=plain.strip() != like.strip()) + "\n" * like.endswith("\n")


def main() -> None:
    """Rename what is in benchmarks/results."""
    parser = argparse.ArgumentParser(description="Name results by what they measured.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: benchmarks/results")
    results: Path = parser.parse_args().results
    changes: list[str] = []
    undecided: list[str] = []
    for path in sorted(results.rglob("*.json")):
        text = path.read_text(encoding="utf-8")
        file = path.relative_to(results).as_posix()
        renamer = Renamer(file, json.loads(text))
        try:
            content = renamer.run()
        except Undecided as error:
            undecided.append(str(error))
            continue
        changes += renamer.changes
        if renamer.changes:
            path.write_text(written(content, text), encoding="utf-8")
        if path.parent.parent.name == "localbench" and "entry" in content and "renamed_from" in content:
            entry = re.sub(rf":{content['blocks']}\b", "", content["entry"])
            stem = re.sub(r"[^\w+.-]", "_", entry) + path.name[path.name.index(f"-k{content['blocks']}-") :]
            if stem != path.name:
                changes.append(f"{file}: -> {stem}")
                path.rename(path.with_name(stem))
        report = path.with_suffix(".md")
        if path.stem in ("comparison", "table") and report.exists():
            old = report.read_text(encoding="utf-8")
            new = relabelled(old, content, BOXES in str(content.get("note", "")))
            if new != old:
                changes.append(f"{report.relative_to(results).as_posix()}: row labels")
                report.write_text(new, encoding="utf-8")
    print("\n".join(changes or ["Nothing to rename."]))
    if undecided:
        raise SystemExit("Undecided:\n" + "\n".join(undecided))


if __name__ == "__main__":
    main()
