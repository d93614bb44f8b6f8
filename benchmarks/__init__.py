"""Side by side with the peers, as a share of what the machine can do: `gpt4v-fast bench`, or `python -m
benchmarks.attention` (`.loss`, `.patch_embed`) in the source tree.

registry.py   what is timed; the cases themselves stand in attention.py, curves.py, loss.py and patch_embed.py,
              the peers in attention_peers.py, engines.py and loss_peers.py
check.py      no time before the numbers are right; scales.py says how far off a right one may be
timing.py     interleaved rounds between peak probes; peaks.py has the probes
beside.py     busy processes beside the measurement
memory.py     extra memory of one call, in a process of its own
runner.py     runs cases; record.py keeps the record (JSON), report.py shows it: table, HTML with plots.py
command.py    the options
performance.py  writes docs/performance.md and its picture from the records in results/
bits.py       which bits the kernels give, and whether they are still the same; its cases stand in bits_*.py

docs/benchmarks.md says how to run them and how numbers are taken.
"""
