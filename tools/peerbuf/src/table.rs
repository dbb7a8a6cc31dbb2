//! Tables for people.

use comfy_table::{ContentArrangement, Table, presets};

/// Narrower than this no table can be read. A serial console, whose width is unknown, and a file
/// get it too.
const LEAST_WIDTH: u16 = 132;

/// A table with these headings, as wide as the terminal.
pub fn new(headings: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(headings);
    if !table.is_tty() || table.width().is_none_or(|width| width < LEAST_WIDTH) {
        table.set_width(LEAST_WIDTH);
    }
    table
}
