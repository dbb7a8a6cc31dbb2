//! Tables for people.

use comfy_table::{ContentArrangement, Table, presets};

/// A table with these headings, as wide as the terminal.
pub fn new(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(headings);
    // In a file or a pipe there is no width to go by.
    if !table.is_tty() {
        table.set_width(140);
    }
    table
}
