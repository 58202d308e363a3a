"""How soon a page of the report can be used: `python benchmarks/report_page.py RUN/report-topk-6144-32.html`.

Opens the page from disk in a headless Chromium without a network, each time in a new context: until its
first latents are drawn and the controls answer (`ready`, from the start of navigation), and from typing into
the search until what is found is drawn (120 ms of it are the script's wait for the next key). The reference
is the same page without its latents. Prints a JSON line with medians.
"""

import argparse
import re
import statistics
import sys
import tempfile
from pathlib import Path

from hardware import report

TESTS = Path(__file__).parents[1] / "tests"
TARGET_MS = 2000

DRIVE = r"""
import json, sys
from playwright.sync_api import sync_playwright

browser, page_url, bare_url, times = sys.argv[1:]
seen = {"ready_ms": [], "bare_ms": [], "token_ms": [], "sort_ms": [], "requests": 0, "heap_mib": 0}
TIMED = '''([id, value]) => new Promise((done) => {
    const start = performance.now(), control = document.getElementById(id);
    new MutationObserver(() => requestAnimationFrame(() => done(performance.now() - start)))
        .observe(document.getElementById("cards"), { childList: true });
    control.value = value;
    control.dispatchEvent(new Event(id === "q" ? "input" : "change"));
})'''

def opened(browser, url):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_offline(True)
    page = context.new_page()
    page.on("request", lambda r: seen.__setitem__("requests", seen["requests"] + (r.url.split("#")[0] != url)))
    page.goto(url)
    page.wait_for_selector("html[data-ready]")
    return context, page, int(page.evaluate("document.documentElement.dataset.ready"))

with sync_playwright() as p:
    b = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
    for _ in range(int(times)):
        context, page, ready = opened(b, bare_url)
        seen["bare_ms"].append(ready)
        context.close()
        context, page, ready = opened(b, page_url)
        seen["ready_ms"].append(ready)
        seen["token_ms"].append(page.evaluate(TIMED, ["q", "return"]))
        page.evaluate(TIMED, ["q", ""])
        seen["sort_ms"].append(page.evaluate(TIMED, ["sort", "max_activation"]))
        seen["heap_mib"] = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
        context.close()
    b.close()
print(json.dumps(seen))
"""


def main() -> None:
    """Parse the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("page", type=Path, help="a page of one SAE that `python -m sae report` wrote")
    parser.add_argument("--times", type=int, default=7)
    options = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "sae")]
    import browser

    html = options.page.read_text(encoding="utf-8")
    blocks = re.compile(r'<script type="application/octet-stream".*?</script>\n?', re.DOTALL)
    if not blocks.search(html):
        parser.error(f"{options.page} has no latents: give a page of one SAE, not the summary of a sweep")
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.html"
        bare.write_text(blocks.sub("", html), encoding="utf-8")
        seen = browser.run(DRIVE, options.page.resolve().as_uri(), bare.as_uri(), options.times)
    medians = {name: round(statistics.median(seen[name])) for name in seen if name.endswith("_ms")}
    report(
        "report_page",
        page_mb=round(options.page.stat().st_size / 1e6, 2),
        times=options.times,
        **medians,
        slowest_ready_ms=max(seen["ready_ms"]),
        target_ms=TARGET_MS,
        requests=seen["requests"],
        heap_mib=round(seen["heap_mib"], 1),
    )


if __name__ == "__main__":
    main()
