"""Stand-ins for the WebUI's `modules`, as far as the page of the extension asks for them."""
