"""Table and plot of the runs that `benchmarks.replication` made.

A score is shown as mean ± standard deviation over seeds. Runs of one seed share
data order, noise and the initial weights of equal parts, so they are compared
seed by seed: the last column is the mean of these differences from the default,
± its standard error.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import statistics

DEFAULT = "tmsa"
# Score -> (its name on the plot and in the table, digits after the point).
SCORES = {
  "recognised": ("recognised as asked", 3),
  "frechet_digits": ("Fréchet distance, digits' features", 3),
  "loss": ("training loss, last tenth", 2),
}


def write(runs: Sequence[dict], out: pathlib.Path, variants: Sequence) -> None:
  """Writes results.json, table.md and plot.png, and prints the table."""
  rows = ",\n".join(json.dumps(run) for run in runs)
  (out / "results.json").write_text(f"[\n{rows}\n]\n")
  text = table(runs, variants)
  (out / "table.md").write_text(text + "\n")
  plot(runs, variants, out / "plot.png")
  print(text)
  print(f"plot: {out / 'plot.png'}", flush=True)


def table(runs: Sequence[dict], variants: Sequence) -> str:
  """Markdown: a row per variant.

  Args:
    runs: as `replication.run` writes them.
    variants: what is known of each, in the order of the rows.
  """
  header = ["variant", "paper", "config", "parameters", "seeds"]
  header += [name for name, _ in SCORES.values()]
  header += ["recognised more than the default"]
  rows = [header, ["---"] * len(header)]
  for variant in variants:
    group = [r for r in runs if r["variant"] == variant.name]
    if not group:
      continue
    fields = "".join(f" {k}={v}" for k, v in variant.fields)
    rows.append(
      [
        variant.what,
        variant.item,
        f"`{variant.arg or 'default'}`{fields}",
        f"{group[0]['parameters']:,}",
        str(len(group)),
        *(spread([r[k] for r in group], n) for k, (_, n) in SCORES.items()),
        difference(runs, variant.name, "recognised"),
      ]
    )
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(values: Sequence[float], places: int) -> str:
  """Mean ± standard deviation; a single value has none."""
  mean = f"{statistics.fmean(values):.{places}f}"
  if len(values) == 1:
    return mean
  return f"{mean} ± {statistics.stdev(values):.{places}f}"


def difference(runs: Sequence[dict], name: str, score: str) -> str:
  """Mean difference from the default at equal seeds ± its standard error."""
  of = lambda name: {r["seed"]: r[score] for r in runs if r["variant"] == name}
  ours, theirs = of(DEFAULT), of(name)
  differences = [theirs[seed] - ours[seed] for seed in theirs if seed in ours]
  if name == DEFAULT or len(differences) < 2:
    return "-"
  error = statistics.stdev(differences) / len(differences) ** 0.5
  return f"{statistics.fmean(differences):+.3f} ± {error:.3f}"


def plot(
  runs: Sequence[dict], variants: Sequence, path: str | os.PathLike
) -> None:
  """Every run as a dot, mean and standard deviation as a bar, per score."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  there = {r["variant"] for r in runs}
  names = [v.name for v in variants if v.name in there]
  figure = Figure(figsize=(11, 1.2 + 0.42 * len(names)), layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, len(SCORES), sharey=True)
  for axes, (key, (title, _)) in zip(panels, SCORES.items()):
    for y, name in enumerate(names):
      values = [r[key] for r in runs if r["variant"] == name]
      axes.plot(values, [y] * len(values), "o", color="0.6", ms=4, zorder=1)
      error = statistics.stdev(values) if len(values) > 1 else 0.0
      axes.errorbar(
        statistics.fmean(values), y, xerr=error, fmt="D", ms=5, capsize=4,
        color="tab:red" if name == DEFAULT else "tab:blue",
      )  # fmt: skip
    axes.set_title(title, fontsize=10)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(alpha=0.3)
  figure.suptitle(
    f"digits, {runs[0]['settings']['steps']} steps: dots are seeds, bars their"
    " mean and standard deviation",
    fontsize=10,
  )
  figure.savefig(path, format="png", dpi=120)
