"""What a browser says to the server when somebody presses Explain, by plain HTTP."""

from __future__ import annotations

import json
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

_open = build_opener(ProxyHandler({})).open


class Visitor:
    """A visitor of the page on this computer's port.

    Args:
        port (int): of the server.
        name (str): of the visit.
    """

    def __init__(self, port: int, name: str = "visit") -> None:
        self.url, self.name = f"http://127.0.0.1:{port}", name
        dependencies = json.loads(self._get("/config"))["dependencies"]
        components = {c["id"]: c for c in json.loads(self._get("/config"))["components"]}
        self.asks = next(d for d in dependencies if len(d["outputs"]) == 4)
        self.fields = [components[i]["props"].get("value") for i in self.asks["inputs"]]
        self.labels = [components[i]["props"].get("label") for i in self.asks["inputs"]]

    def _get(self, path: str, body: Any = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        with _open(request, timeout=120) as answer:
            return answer.read()

    def explained(self, **changed: Any) -> list[str]:
        """The four pieces of HTML; fields are changed by their labels, blanks as underscores."""
        values = list(self.fields)
        for label, value in changed.items():
            name = label if label in self.labels else label.replace("_", " ")
            values[self.labels.index(name)] = value
        body = {"data": values, "fn_index": self.asks["id"], "session_hash": self.name}
        self._get("/gradio_api/queue/join", body)
        found = self._get(f"/gradio_api/queue/data?session_hash={self.name}").decode()
        for line in found.splitlines():
            said = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if said.get("msg") == "process_completed":
                pieces = said["output"].get("data") or [said["output"]["error"]]
                return [piece if isinstance(piece, str) else "" for piece in pieces]
        raise AssertionError(found[-500:])
