"""A headless Chromium for tests of pages, spoken to over its debugging pipe, so that the page stays as written."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

LOOK = """
const frames = async () => { // sizes and scrolling are told by frames
  for (let i = 0; i < 4; i += 1) await new Promise(requestAnimationFrame);
};
const all = (query, root = document) => [...root.querySelectorAll(query)];
const one = (query) => document.querySelector(query);
const cells = (row) => Object.fromEntries(
  all(":scope > [data-value]", row).map((cell) => [cell.dataset.key, cell.dataset.value]));
const numbers = () => Object.fromEntries(
  all("table[id]").map((table) => [table.id, all(":scope > tbody > tr:not(.detail)", table).map(cells)]));
const rows = () => all("#layers-table > tbody > tr:not(.detail)");
const column = (key) => rows().map((row) => row.querySelector(`:scope > [data-key="${key}"]`).dataset.value ?? null);
const flush = () => dispatchEvent(new Event("beforeprint")); // a printed page has all rows
const set = async (query, value, event = "change") => {
  one(query).value = value; one(query).dispatchEvent(new Event(event, { bubbles: true })); await frames();
};
function overflowing() {
  const width = document.documentElement.clientWidth;
  const found = [];
  for (const node of all("body *")) {
    if (node.closest("svg, #tip") || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const what = [node.tagName, node.id || node.textContent.slice(0, 40)];
    const apart = ["auto", "scroll"].includes(style.overflowX) || style.display === "inline";
    if (!apart && node.clientWidth && node.scrollWidth > node.clientWidth + 1) found.push(["cut", ...what]);
    const boxed = node.parentElement.closest(".scroll, pre");
    if (!boxed && node.getBoundingClientRect().right > width + 1) found.push(["wide", ...what]);
  }
  for (const text of all(".frame svg text")) {
    const [box, frame] = [text, text.ownerSVGElement].map((node) => node.getBoundingClientRect());
    const inside = box.left >= frame.left - 1 && box.right <= frame.right + 1
      && box.top >= frame.top - 1 && box.bottom <= frame.bottom + 1;
    if (!inside) found.push(["text", text.textContent]);
  }
  return found;
}
"""


# Chromium reads its commands from 3 and answers on 4
START = "import os, sys; [os.dup2(int(sys.argv[end - 2]), end) for end in (3, 4)]; os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """One Chromium for many pages."""

    def __init__(self, folder: Path) -> None:
        ends = [*os.pipe(), *os.pipe()]
        theirs, self.write, self.read, answers = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends)
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder}",
            "--remote-debugging-pipe",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs), str(answers), str(CHROMIUM), *options],
            pass_fds=(theirs, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*ends, theirs, answers):
            os.close(end)
        self.number = 0
        self.buffer = b""
        self.events: list[dict[str, Any]] = []

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            assert select.select([self.read], [], [], 60)[0], "the browser says nothing"
            piece = os.read(self.read, 1 << 20)
            assert piece, "the browser went away"
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        to = {} if session is None else {"sessionId": session}
        message = {"id": self.number, "method": method, "params": parameters, **to}
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer)
        found: dict[str, Any] = answer["result"]
        return found

    def look(self, file: Path, script: str, width: int, media: str) -> dict[str, Any]:
        """What a script finds in the page at this width. Fails where the page complains, or asks for anything."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable", session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", session, **size)
        self.ask("Emulation.setEmulatedMedia", session, media=media)
        self.events.clear()
        self.ask("Page.navigate", session, url=file.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        expression = LOOK + f"(async () => {{ await frames(); {script} }})()"
        answer = self.ask("Runtime.evaluate", session, expression=expression, awaitPromise=True, returnByValue=True)
        self.ask("Target.closeTarget", targetId=target)
        said = [(event["method"], event["params"]) for event in self.events]
        complaints = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        assert [event for event in said if event[0] in complaints] == []
        asked = [event["request"]["url"] for method, event in said if method == "Network.requestWillBeSent"]
        assert [address for address in asked if not address.startswith("data:")] == [file.as_uri()]
        assert "exceptionDetails" not in answer, answer
        found: dict[str, Any] = answer["result"]["value"]
        return found

    def close(self) -> None:
        self.ask("Browser.close")
        self.process.wait(30)
        os.close(self.write)
        os.close(self.read)
