"""Notes in $AUDIT_LOG every address beyond this machine that is asked for."""

import ipaddress
import os
import sys

_LOCAL = {"", "localhost", "0.0.0.0", "::", None}


def _is_local(host) -> bool:
  if isinstance(host, bytes):
    host = host.decode()
  try:
    return host in _LOCAL or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _note(event: str, args: tuple) -> None:
  if event in ("socket.connect", "socket.sendto"):
    address = args[1]
    if not isinstance(address, tuple) or _is_local(address[0]):
      return  # a tuple is an address of the internet, a text a local file
  elif event not in ("socket.getaddrinfo", "socket.gethostbyname"):
    return
  elif _is_local(args[0]):
    return
  with open(os.environ["AUDIT_LOG"], "a") as log:
    log.write(f"{event} {args}\n")


if "AUDIT_LOG" in os.environ:
  sys.addaudithook(_note)
