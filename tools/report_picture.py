"""The picture of the report in the README: `python tools/report_picture.py demo-out/report-topk-1536-32.html`.

Shows the page at one latent, in the browser of the tests; its screenshot is reduced to 64 colours.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from PIL import Image

TESTS = Path(__file__).parents[1] / "tests"

SHOOT = """
import sys
from playwright.sync_api import sync_playwright

browser, url, latent, out, width, height = sys.argv[1:]
with sync_playwright() as p:
    b = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
    page = b.new_page(viewport={"width": int(width), "height": int(height)}, color_scheme="light")
    page.goto(url + (f"#latent-{latent}" if latent != "None" else ""))
    page.wait_for_selector("html[data-ready]")
    page.evaluate("document.querySelector('#latents').scrollIntoView()")
    page.screenshot(path=out)
    b.close()
print("{}")
"""


def picture(page: Path, latent: int | None, out: Path, size: tuple[int, int]) -> None:
    """Write a screenshot of the page's latents, searched for one if it is named."""
    sys.path[:0] = [str(TESTS), str(TESTS / "sae")]
    import browser

    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        browser.run(SHOOT, page.resolve().as_uri(), latent, shot, *size)
        Image.open(shot).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--latent", type=int, help="search for this latent")
    parser.add_argument("--out", type=Path, default=Path("docs/report.png"))
    options = parser.parse_args()
    picture(options.page, options.latent, options.out, (1200, 880))


if __name__ == "__main__":
    main()
