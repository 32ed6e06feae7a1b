"""A router that maps ports by UPnP (an Internet Gateway Device), on loopback: SSDP over UDP, and SOAP over HTTP."""

from __future__ import annotations

import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END = b"the test has ended"
GROUP = ("239.255.255.250", 1900)
KIND = "urn:schemas-upnp-org:device:InternetGatewayDevice:1"
SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"
_DEVICE = (
    "<device><deviceType>urn:schemas-upnp-org:device:{}:1</deviceType><friendlyName>fake</friendlyName>{}</device>"
)
_SERVICE = (
    f"<serviceList><service><serviceType>{SERVICE}</serviceType><serviceId>urn:upnp-org:serviceId:WANIPConn1</serviceId>"
    "<SCPDURL>/scpd</SCPDURL><controlURL>/control</controlURL><eventSubURL>/events</eventSubURL></service></serviceList>"
)
_ERROR = (
    "<s:Fault><faultcode>s:Client</faultcode><faultstring>UPnPError</faultstring><detail>"
    '<UPnPError xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>{0}</errorCode></UPnPError></detail></s:Fault>'
)


@dataclass
class FakeRouter:
    """It has the public address `address`. `ports`: what each of its ports leads to.

    `asked` are the leases that it was asked for, in seconds.
    """

    address: str = "40.7.0.2"
    ports: dict[int, tuple[str, int]] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    takes_leases: bool = True
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        handler = type("Handler", (_Handler,), {"router": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._udp.bind(GROUP)
        joining = socket.inet_aton(GROUP[0]) + socket.inet_aton("127.0.0.1")
        self._udp.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, joining)
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self._answering = threading.Thread(target=self._answer_searches, daemon=True)
        self._answering.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            sender.sendto(END, GROUP)
        self._answering.join()
        self._udp.close()

    def wait_for_requests(self, number: int, *, seconds: float) -> None:
        """Wait until so many ports were asked for."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= number, timeout=seconds)

    def _answer_searches(self) -> None:
        place = f"http://127.0.0.1:{self._http.server_port}/device"
        answer = f"HTTP/1.1 200 OK\r\nST: {KIND}\r\nUSN: uuid:1::{KIND}\r\nEXT:\r\nLOCATION: {place}\r\n\r\n"
        data = b""
        while data != END:
            data, asker = self._udp.recvfrom(4096)
            if KIND.encode() in data:
                self._udp.sendto(answer.encode(), asker)

    def act(self, action: str, given: dict[str, str]) -> str:
        """The answer to an action, or `_ERROR` with its code."""
        port = int(given.get("NewExternalPort", "0"))
        match action:
            case "GetExternalIPAddress":
                return f"<NewExternalIPAddress>{self.address}</NewExternalIPAddress>"
            case "GetSpecificPortMappingEntry":
                if port not in self.ports:
                    return _ERROR.format(714)
                host, inner = self.ports[port]
                return (
                    f"<NewInternalPort>{inner}</NewInternalPort><NewInternalClient>{host}</NewInternalClient>"
                    "<NewEnabled>1</NewEnabled><NewPortMappingDescription>x</NewPortMappingDescription>"
                    "<NewLeaseDuration>0</NewLeaseDuration>"
                )
            case "AddPortMapping":
                lease = int(given["NewLeaseDuration"])
                with self.changed:
                    self.asked.append(lease)
                    self.changed.notify_all()
                if lease and not self.takes_leases:
                    return _ERROR.format(725)
                self.ports[port] = (given["NewInternalClient"], int(given["NewInternalPort"]))
            case "DeletePortMapping":
                del self.ports[port]
        return ""


class _Handler(BaseHTTPRequestHandler):
    router: FakeRouter

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        inner = _DEVICE.format("WANConnectionDevice", _SERVICE)
        for kind in ("WANDevice", "InternetGatewayDevice"):
            inner = _DEVICE.format(kind, f"<deviceList>{inner}</deviceList>")
        self._send(f'<root xmlns="urn:schemas-upnp-org:device-1-0">{inner}</root>')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        action = self.headers["SOAPAction"].strip('"').partition("#")[2]
        answer = self.router.act(action, dict(re.findall(r"<(New\w+)[^>]*>([^<]*)<", body)))
        if not answer.startswith("<s:Fault"):
            answer = f'<u:{action}Response xmlns:u="{SERVICE}">{answer}</u:{action}Response>'
        self._send(
            f'<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>{answer}</s:Body></s:Envelope>',
            status=500 if "<s:Fault" in answer else 200,
        )

    def _send(self, text: str, *, status: int = 200) -> None:
        content = f'<?xml version="1.0"?>{text}'.encode()
        self.send_response(status)
        self.send_header("Content-Type", 'text/xml; charset="utf-8"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
