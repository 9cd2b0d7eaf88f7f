"""In which fields two settings differ, in words."""

from collections.abc import Mapping


def differences(there: Mapping, here: Mapping, path: str = "") -> list[str]:
  """["model.dropout is 0.1 there and 0.2 here", ...] of two trees of settings.

  Args:
    there: settings that something was made or begun with.
    here: settings that it is to be used or go on with.
    path: what stands before the names, as "model".
  """
  found = []
  for key in sorted(there.keys() | here.keys()):
    name, old, new = f"{path}.{key}".lstrip("."), there.get(key), here.get(key)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
      found += differences(old, new, name)
    elif old != new:
      found.append(f"{name} is {old!r} there and {new!r} here")
  return found
