"""A small MCP server, for docs/your-own-tool.md: it keeps notes, and gives them back."""

from mcp.server.mcpserver import MCPServer

server = MCPServer("notes")
notes: list[str] = []


@server.tool()
def add_note(text: str) -> int:
    """Keep a note; how many there are now."""
    notes.append(text)
    return len(notes)


@server.tool()
def read_notes() -> str:
    """All notes, a line each."""
    return "\n".join(notes)


if __name__ == "__main__":
    server.run("stdio")
