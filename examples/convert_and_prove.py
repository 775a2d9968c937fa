"""Convert a folder to Megatron Core and back, prove it, and see that the proof can fail."""

from __future__ import annotations

import re
from pathlib import Path

import mbx
from mappings import table_text

LLAMA = Path(__file__).resolve().parents[1] / "fixtures" / "tiny" / "llama"


def convert(source: Path | str, target: str, **more: object) -> None:
    """Convert, and say what became of how many tensors."""
    job = mbx.plan(source, target, mbx.Options(overwrite=True, **more))  # headers alone; raises what the run would
    outcome = job.run()
    print(f"{target}: {job.plan.ledger.consumed} tensors read, {outcome.bytes_written:,} bytes written")


convert(LLAMA, "ckpt", layout=mbx.Layout(tp=2))
convert("ckpt", "back")
report = mbx.verify(LLAMA, "ckpt")
for leg in report.legs:
    print(f"  {leg.name:8} {leg.status:8} {leg.summary}")
assert report.passed and mbx.diff(LLAMA, "back").same

# The control: gate and up exchanged in the table. A round trip cannot see it; the proof does, and says why.
swapped = re.sub(r'"(mlp\.gate_proj\.weight)", "(mlp\.up_proj\.weight)"', r'"\2", "\1"', table_text("llama"))
Path("swapped.toml").write_text(swapped)
convert(LLAMA, "broken", mapping="swapped.toml")
convert("broken", "blind", mapping="swapped.toml")
assert mbx.diff(LLAMA, "blind").same
wrong = mbx.verify(LLAMA, "broken")
assert not wrong.passed and wrong.first is not None
print(f"exchanged on purpose: {wrong.first.name}: {wrong.first.cause}")
