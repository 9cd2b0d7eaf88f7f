"""Reading a config's argument string, as in --config=configs/X.py:debug,a=2."""

import types


def parse_arg(arg: str | None, **variants: tuple) -> types.SimpleNamespace:
  """Values of a config's variants.

  Args:
    arg: comma-separated `name=value`, or `name` alone for a switch.
    **variants: {name: allowed values}, the first being the default; a switch is
      (False, True).

  Raises:
    ValueError: an unknown variant or value, naming the valid ones.
  """
  values = {name: allowed[0] for name, allowed in variants.items()}
  for item in filter(None, (arg or "").split(",")):
    name, _, text = item.partition("=")
    if name not in variants:
      raise ValueError(
        f"unknown variant {name!r} in the config's argument string: valid are"
        f" {_describe(variants)}"
      )
    match = [v for v in variants[name] if str(v) == (text or "True")]
    if not match:
      raise ValueError(
        f"variant {item!r} in the config's argument string: use"
        f" {_describe({name: variants[name]})}"
      )
    values[name] = match[0]
  return types.SimpleNamespace(**values)


def run_name(stem: str, arg: str | None) -> str:
  """Name of the run, from the config's and its variants."""
  return "-".join([stem, *filter(None, (arg or "").split(","))])


def blocks(text: int | str) -> int | tuple[int, ...]:
  """Blocks per level, one number or one per level written as 1-2-2-2."""
  return text if isinstance(text, int) else tuple(map(int, text.split("-")))


def _describe(variants: dict[str, tuple]) -> str:
  return ", ".join(
    name
    if allowed == (False, True)
    else f"{name}={'|'.join(str(value) for value in allowed)}"
    for name, allowed in variants.items()
  )
