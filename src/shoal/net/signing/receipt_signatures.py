"""The signatures of receipts: one is good for one session of one client on one server."""

from __future__ import annotations

import json
from typing import Any

from shoal.net.transport import Transport
from shoal.protocol import Receipt

_DOMAIN = b"shoal receipt 1\n"  # no signature of anything else begins like this
_UNSIGNED = "0" * 128


def statement(receipt: Receipt, *, session: str, server: str, client: str) -> dict[str, Any]:
    """What a receipt says about a session, whose name the client has drawn, as JSON writes it."""
    return {
        "session": session,
        "server": server,
        "client": client,
        "epoch": receipt.epoch,
        "first": receipt.first,
        "end": receipt.end,
        "inputs": receipt.inputs,
        "answered": receipt.answered,
        "pushed": receipt.pushed,
    }


def _signed_bytes(receipt: Receipt, *, session: str, server: str, client: str) -> bytes:
    said = statement(receipt, session=session, server=server, client=client)
    return _DOMAIN + json.dumps(said, separators=(",", ":")).encode()


def signed_receipt(transport: Transport, *, session: str, client: str, **fields: Any) -> Receipt:
    """A receipt of these fields that this peer has signed."""
    receipt = Receipt(**fields, signature=_UNSIGNED)
    signature = transport.sign(_signed_bytes(receipt, session=session, server=transport.peer, client=client))
    return receipt.model_copy(update={"signature": signature.hex()})


def is_signed(transport: Transport, receipt: Receipt, *, session: str, server: str) -> bool:
    """Whether a server has signed a receipt for this peer's session."""
    data = _signed_bytes(receipt, session=session, server=server, client=transport.peer)
    return transport.verify(server, data, bytes.fromhex(receipt.signature))
