"""The tables of the page "Benchmarks", made from the reports in benchmarks/results/ while the site is built."""

import json
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev

RESULTS = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"
MARK = "<!-- reports -->"
UNMEASURED = """
!!! note "Not measured on a GPU yet"
    There is no report of the loss on a GPU. Its numbers below are of CPUs.
"""


def on_page_markdown(markdown, page, **_):
    """Called by MkDocs with the Markdown of each page: puts the reports where the mark is."""
    return markdown.replace(MARK, tables(committed())) if MARK in markdown else markdown


def committed():
    """All reports that are kept, with their files: newest first, those of one folder together."""
    files = [path for path in RESULTS.glob("*/*.json") if path.parent.name != "local"]
    return [(path, json.loads(path.read_text())) for path in sorted(files, key=lambda path: path.parts, reverse=True)]


def tables(reports):
    kinds = {"loss": [], "group": [], "training": [], "other": []}
    for path, report in reports:
        kinds[kind(report)].append((path, report))
    parts = [] if any(report["machine"]["gpu"] for _, report in kinds["loss"]) else [UNMEASURED]
    parts += ["## The loss on one device\n", *(loss_section(*entry) for entry in kinds["loss"])]
    parts.append("## Several processes\n")
    for _, together in groupby(kinds["group"], key=lambda entry: entry[0].parent):
        parts.append(group_section(list(together)[::-1]))
    if kinds["training"]:
        parts += ["## Training\n", *(training_section(*entry) for entry in kinds["training"])]
    parts += [registered_section(path) for path in sorted(RESULTS.glob("*/report.md"))]
    if kinds["other"]:
        names = [f"- [{path.parent.name}/{path.name}]({link(path)})" for path, _ in kinds["other"]]
        parts += ["## Other reports\n", *names]
    return "\n".join(parts)


def kind(report):
    """Which script wrote it."""
    if "processes" in report:
        return "group"
    if "runs" in report and "machine" in report:
        return "training"
    return "loss" if "results" in report and "machine" in report else "other"


def heading(report):
    machine = report["machine"]
    return f"### {machine['gpu'] or machine['cpu']}, {report['date'][:10]}\n"


def conditions(report):
    machine = report["machine"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    changed = ", with uncommitted changes" if (report["commit"] or "").endswith("+") else ""
    commit = f"`{report['commit'][:12]}`{changed}" if report["commit"] else "unknown"
    return (
        f"- Machine: {machine['cpu']} ({machine['cpu_capability']}), {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['memory_gb']} GB{gpu}; {machine['system']}, load average before the "
        f"run {machine['load_before']}\n"
        f"- Versions: {versions}; float32 matmul precision {machine['float32_matmul_precision']}\n"
        f"- Taken {report['date'].replace('T', ' ')}, commit {commit}\n"
    )


# ---- Reports of bench_loss.py ----


def loss_section(path, report):
    parts = [heading(report), conditions(report), f"- [The report]({link(path)})\n"]
    pictures = [f"![Time and memory against the batch size]({link(picture)})" for picture in drawn(path)]
    parts.append("\n" + "\n".join(pictures) + "\n")
    parts.append("\nMedian milliseconds, forward and backward:\n\n" + by_size(report, total_ms))
    parts.append("\nHighest extra memory, MB:\n\n" + by_size(report, extra_mb))
    parts.append("\nLargest relative error against float64, of the loss and of the gradient:\n\n" + errors(report))
    return "\n".join(parts)


def by_size(report, cell):
    """A row for each case, a column for each method."""
    results = report["results"]
    titles = list(dict.fromkeys(result["title"] for result in results))
    rows = {}
    for result in results:
        case = (result["labels"], result["dtype"], f"{result['d']}", f"{result['c']}", f"{result['n']:,}")
        rows.setdefault(case, {})[result["title"]] = cell(result)
    body = [[*case, *(cells.get(title, "") for title in titles)] for case, cells in rows.items()]
    return markdown_table(["labels", "dtype", "D", "C", "N", *titles], body, words=2)


def total_ms(result):
    return milliseconds(result["total_ms"][1]) if result.get("total_ms") else result.get("status", "")


def extra_mb(result):
    return "" if result.get("extra_bytes") is None else f"{result['extra_bytes'] / 1e6:,.1f}"


def errors(report):
    worst = {}
    for result in report["results"]:
        row = worst.setdefault((result["title"], result["dtype"]), {"loss_error": None, "gradient_error": None})
        for name in row:
            known = [value for value in (row[name], result.get(name)) if value is not None]
            row[name] = max(known, default=None)
    shown = [
        [*key, *("" if value is None else f"{value:.1e}" for value in row.values())]
        for key, row in worst.items()
        if any(value is not None for value in row.values())
    ]
    return markdown_table(["method", "dtype", "loss", "gradient"], shown, words=2)


# ---- Reports of bench_distributed.py: one file for each number of processes ----


def group_section(entries):
    report = entries[0][1]
    parts = [heading(report), conditions(report)]
    links = ", ".join(f"[{report['processes']}]({link(path)})" for path, report in entries)
    parts.append(f"- Collectives: {report['collectives']}; the reports, by processes: {links}\n")
    times, sizes = [], []
    for _, report in entries:
        for (rows_each, labels), case in groupby(report["results"], key=lambda r: (r["n_local"], r["labels"])):
            found = {result["title"]: result for result in case}
            head, others = f"{report['processes']} × {rows_each:,}", list(found.values())[1:]
            own = next(iter(found.values()))  # group=, which the others are compared with
            ratios = [f"{milliseconds(r['ms'][1])} ({r['ms'][1] / own['ms'][1]:.1f}x)" for r in others]
            times.append([head, labels, milliseconds(own["ms"][1]), *ratios])
            sizes.append([head, labels, *(memory_and_traffic(result) for result in found.values())])
            titles = list(found)
    heads = ["processes × rows", "labels", *titles]
    parts.append("\nMedian milliseconds, forward and backward, and how many times that of `group=`:\n")
    parts.append(markdown_table(heads, times, words=2))
    parts.append("\nHighest extra memory of a process, MB; MB received in the forward and the backward pass:\n")
    parts.append(markdown_table(heads, sizes, words=2))
    return "\n".join(parts)


def memory_and_traffic(result):
    moved = " + ".join(f"{number / 1e6:.2f}" for number in result["received_bytes"])
    return f"{result['extra_bytes'] / 1e6:,.1f}; {moved}"


# ---- Reports of bench_train.py ----

METHODS = {
    "ce": "cross-entropy",
    "supcon": "SupCon",
    "mix": "GenSCL, mixup-cutmix",
    "kd": "GenSCL, mixup-cutmix, teacher",
    "teacher": "the teacher: cross-entropy, mixup-cutmix",
}


def training_section(path, report):
    parts = [heading(report), conditions(report), f"- Options of the trainer: `{' '.join(report['settings'])}`"]
    parts.append(f"- [The report]({link(path)})\n")
    parts += [f"![Accuracy of each method and seed]({link(picture)})\n" for picture in drawn(path)]
    judges = list(dict.fromkeys(judge for runs in report["runs"].values() for run in runs for judge in run["results"]))
    judges = [judge for judge in judges if judge in ("linear", "knn", "classifier")]
    rows = []
    for key, runs in report["runs"].items():
        found = [[run["results"][judge][0] for run in runs if judge in run["results"]] for judge in judges]
        cells = [mean_and_spread(values) for values in found]
        rows.append([METHODS.get(key, key), f"{len(runs)}", *cells, f"{mean(run['seconds'] for run in runs):,.0f}"])
    parts.append("Top-1 test accuracy in %, mean ± standard deviation over the seeds:\n")
    parts.append(markdown_table(["method", "seeds", *judges, "seconds a run"], rows, words=1))
    return "\n".join(parts)


def registered_section(path):
    """The report of `report_training.py`, its headings one level lower and its figures where they are from docs/."""
    lines = [f"#{line}" if line.startswith("#") else line for line in path.read_text(encoding="utf-8").splitlines()]
    return "\n".join(lines).replace("](", f"]({link(path.parent)}/") + "\n"


def mean_and_spread(values):
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "") if values else ""


# ---- Words and numbers ----


def milliseconds(value):
    return f"{value:,.{0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3}f}"


def markdown_table(heads, rows, words):
    """The first columns, as many as `words`, hold words; numbers go to the right."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows]) + "\n"


def drawn(path):
    """The pictures of a report: its own name, and further ones with a number."""
    return sorted(path.parent.glob(f"{path.stem}*.png"), key=lambda picture: (len(picture.stem), picture.stem))


def link(path):
    """From docs/, as the repository has it."""
    return f"../{path.relative_to(RESULTS.parent.parent).as_posix()}"
