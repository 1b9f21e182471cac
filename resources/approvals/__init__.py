"""Approvals: which releases wait for a named person, their requests, and the answers.

Everything that matters stands in the ledger, so a request survives any restart and no process
waits. Only the token, which the ledger knows by its hash, lies beside it.
"""

from resources.approvals.policy import ApprovalPolicy, Level, Risk, assess, load
from resources.approvals.requested import (
    Request,
    answer,
    ask,
    find,
    requests,
    require,
    token_of,
)

__all__ = [
    "ApprovalPolicy",
    "Level",
    "Request",
    "Risk",
    "answer",
    "ask",
    "assess",
    "find",
    "load",
    "requests",
    "require",
    "token_of",
]
