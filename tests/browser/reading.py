"""Pages as a reader opens them: size and theme, what the browser complains of, contrast."""

from typing import Any

PHONE, DESK = (390, 844), (1100, 900)
# text of a ratio below these is hard to read (WCAG 2.2, 1.4.3)
SMALL_TEXT, LARGE_TEXT = 4.5, 3.0

# every drawn piece of text: its words, its contrast with what is behind it, and whether it is large
CONTRASTS = """() => {
  const rgb = text => (text.match(/[0-9.]+/g) || []).map(Number);
  const part = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const told = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || ['title', 'desc', 'style'].includes(node.localName)) continue;
    const style = getComputedStyle(node);
    const colour = rgb(node.ownerSVGElement ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(node))].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    told.push([node.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05), large]);
  }
  return told;
}"""


def open_page(browser: Any, url: str, size: tuple[int, int], scheme: str) -> tuple[Any, list[str]]:
    """Open a page; what the browser complains of, and what it asks others for, comes with it."""
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.extend(_foreign(request.url)))
    page.goto(url)
    return page, complaints


def _foreign(url: str) -> list[str]:
    own = url.startswith(("file:", "data:", "http://127.0.0.1:"))
    return [] if own else [f"asks for {url}"]


def assert_contrast(page: Any, least_texts: int) -> None:
    """Check that every drawn piece of text stands out from what is behind it."""
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > least_texts
    assert not [
        (words, ratio)
        for words, ratio, large in contrasts
        if ratio < (LARGE_TEXT if large else SMALL_TEXT)
    ]
