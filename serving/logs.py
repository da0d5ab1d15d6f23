"""The server's log: one line for each request that ended, and what else happens, on stderr.

As text for people, or as one JSON object a line for machines. What clients choose (names, ids) is
always quoted, so that nobody can write a line of their own. Prompts and answers are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from serving.config import LogFormat
from serving.service import Report

_log = logging.getLogger("serving.requests")


def set_up(kind: LogFormat) -> None:
    """Sends what this process logs to stderr: ours from INFO on, of libraries only warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if kind == "json" else _TextFormatter())
    logging.basicConfig(handlers=[handler], force=True)
    for name in ("loongjax", "serving"):
        logging.getLogger(name).setLevel(logging.INFO)


def log_request(report: Report) -> None:
    """Logs a request that has ended."""
    call, times = report.call, report.timings
    ttft_s = None
    if times is not None and times.first_token is not None:
        ttft_s = round(report.gate_s + times.first_token - times.arrival, 6)
    fields: dict[str, Any] = {
        "request_id": call.name,
        "client": call.client,
        "protocol": call.protocol,
        "outcome": report.outcome,
        "prompt_tokens": report.prompt_tokens,
        "answer_tokens": report.answer_tokens,
        "gate_s": round(report.gate_s, 6),
        "ttft_s": ttft_s,
        "total_s": round(report.total_s, 6),
    }
    if report.error is not None:
        fields["error"] = report.error
    _log.info("request ended", extra={"fields": fields})


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One JSON object."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """A sentence, and the fields as KEY=VALUE, values in JSON."""
        fields = getattr(record, "fields", {})
        pairs = (f" {key}={json.dumps(value)}" for key, value in fields.items())
        return super().format(record) + "".join(pairs)
