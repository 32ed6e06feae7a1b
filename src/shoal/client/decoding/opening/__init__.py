"""How a session is opened on servers, and which of its tokens they may have computed before."""
