"""From bins to what models eat: ten-second windows, five numbers a channel, their labels, tables and tensors."""
