"""`python -m sae report`: self-contained HTML about the SAEs of a run.

`write_report` is the whole surface. The summary comes from files only (`sae.json`,
`metrics.jsonl`, `eval.json`, `latents.parquet`) and every number in it is the one in `eval.json`.
The dataset, where it can be reached, adds its card and a dashboard for each latent; the LM adds
what latents do to its logits. What is absent is said, not guessed. Text of the corpus never
becomes markup: dashboards are made of text nodes, everything else is escaped.
"""

from sae.report.cli import report_command
from sae.report.page import write_report

__all__ = ["report_command", "write_report"]
