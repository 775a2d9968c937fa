"""From files of documents and chats to micro-batches on a device."""
