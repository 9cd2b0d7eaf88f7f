"""What one accelerator says about the project, for docs/gpu.md.

The files, from what is run to what is written:
  stages.py      the stages in their order of worth, with caps on their time
  __main__.py    runs them, each in a process of its own
  child.py       that process
  rows.py        rows: made, read, merged, kept
  page.py        rows to docs/gpu.md; peaks.py is what the cards promise
  device.py      what the stages that use JAX share
  ceilings.py, train.py, goldens.py, ...   the stages
"""
