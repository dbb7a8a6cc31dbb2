//! Tables for people, and the numbered details below them. No line is wider than the terminal.
//!
//! A column shrinks down to its longest word; then its cells wrap. A table that is still too
//! wide becomes several tables ([`Table::pieces`]) or a list, with a line for each cell
//! ([`Table::list`]). Nothing is cut off: a word breaks only if it is too long by itself, such
//! as a file's path.

use std::ops::Range;

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Maximum width of lines, because longer lines are hard to read.
const MOST: usize = 100;
/// Minimum width of lines. A narrower terminal breaks them itself.
const LEAST: usize = 24;
/// The longest word that a column makes room for. Reason codes and PCI addresses are shorter.
const WORD: usize = 24;

/// The width of standard output: the terminal's, or else `$COLUMNS`, and at most 100.
pub fn width() -> usize {
    let terminal = rustix::termios::tcgetwinsize(std::io::stdout());
    let columns = std::env::var("COLUMNS").ok();
    usable(terminal.ok().map(|size| size.ws_col), columns.as_deref())
}

fn usable(terminal: Option<u16>, columns: Option<&str>) -> usize {
    let terminal = terminal.map(usize::from);
    let columns = columns.and_then(|columns| columns.parse().ok());
    // A serial console does not know its width and reports 0.
    let known = |width: &usize| *width > 0;
    terminal
        .filter(known)
        .or(columns.filter(known))
        .unwrap_or(MOST)
        .clamp(LEAST, MOST)
}

/// Headings and rows. A line break in a cell stays one.
#[derive(Debug, Default)]
pub struct Table {
    headings: Vec<String>,
    rows: Vec<Vec<String>>,
    /// Columns whose lines do not wrap.
    whole: Vec<usize>,
}

/// The borders around and between the cells of a line.
struct Frame {
    left: &'static str,
    between: &'static str,
    right: &'static str,
    /// The borders of the line below the headings, and the character that fills it.
    rule: (&'static str, &'static str, &'static str, &'static str),
}

/// A frame without an outer border, which takes room and breaks first.
const TERMINAL: Frame = Frame {
    left: "",
    between: " ┆ ",
    right: "",
    rule: ("", "═╪═", "", "═"),
};

const MARKDOWN: Frame = Frame {
    left: "| ",
    between: " | ",
    right: " |",
    rule: ("|-", "-|-", "-|", "-"),
};

impl Table {
    pub fn new<T: Into<String>>(headings: impl IntoIterator<Item = T>) -> Table {
        Table {
            headings: headings.into_iter().map(Into::into).collect(),
            ..Table::default()
        }
    }

    /// Makes a column whose lines do not wrap. If one of its lines is too long, the table is
    /// too wide.
    pub fn whole(mut self, column: usize) -> Table {
        self.whole.push(column);
        self
    }

    /// Adds a row. Missing cells are empty; cells beyond the headings are dropped.
    pub fn row<T: Into<String>>(&mut self, cells: impl IntoIterator<Item = T>) {
        let mut row: Vec<String> = cells.into_iter().map(Into::into).collect();
        row.resize(self.headings.len(), String::new());
        self.rows.push(row);
    }

    /// The table, or the list if the table is too wide.
    pub fn show(&self, width: usize) -> String {
        self.fit(width).unwrap_or_else(|| self.list(width))
    }

    /// The table, if it fits. Ends without a line break, like the other forms.
    pub fn fit(&self, width: usize) -> Option<String> {
        let columns = 0..self.headings.len();
        let least = columns.clone().map(|column| self.least(column));
        let mut widths: Vec<usize> = least.collect();
        let between = TERMINAL.between.width() * widths.len().saturating_sub(1);
        let mut left = width.checked_sub(between + widths.iter().sum::<usize>())?;
        // The narrowest column with wrapping cells gets the remaining room first, and then the
        // narrowest column with a wrapping heading.
        let cells = columns.clone().map(|column| self.longest_cell(column));
        let all = columns.map(|column| self.most(column));
        for most in [cells.collect::<Vec<_>>(), all.collect()] {
            while left > 0 {
                let wrapping = widths.iter_mut().zip(&most);
                let wrapping = wrapping.filter(|(width, most)| **width < **most);
                let Some(narrowest) = wrapping.map(|(width, _)| width).min() else {
                    break;
                };
                *narrowest += 1;
                left -= 1;
            }
        }
        Some(self.draw(&TERMINAL, &widths))
    }

    /// The table, split into as few tables as necessary. Each has the first column.
    pub fn pieces(&self, width: usize) -> Option<String> {
        let columns = self.headings.len().saturating_sub(1);
        (1..=columns.max(1)).find_map(|pieces| {
            let each = columns.div_ceil(pieces).max(1);
            let starts = (1..=columns.max(1)).step_by(each);
            let ranges = starts.map(|start| start..(start + each).min(columns + 1));
            let texts: Option<Vec<String>> =
                ranges.map(|range| self.part(range).fit(width)).collect();
            Some(texts?.join("\n\n"))
        })
    }

    /// The first column and the given columns.
    fn part(&self, columns: Range<usize>) -> Table {
        let take = |row: &Vec<String>| {
            let first = row.first().into_iter();
            first.chain(&row[columns.clone()]).cloned().collect()
        };
        let moved = |column: &usize| match column {
            0 => Some(0),
            _ => columns.contains(column).then(|| column - columns.start + 1),
        };
        Table {
            headings: take(&self.headings),
            rows: self.rows.iter().map(take).collect(),
            whole: self.whole.iter().filter_map(moved).collect(),
        }
    }

    /// A line for each cell, with its heading before it.
    pub fn list(&self, width: usize) -> String {
        let show = |row: &Vec<String>| {
            let mut text = String::new();
            for (number, (heading, cell)) in self.headings.iter().zip(row).enumerate() {
                let line = match (heading.as_str(), cell.as_str()) {
                    (_, "") => continue,
                    ("", cell) => cell.to_owned(),
                    (heading, cell) => format!("{heading}: {cell}"),
                };
                let indent = if number == 0 { "" } else { "  " };
                for line in wrap_hanging(&line, width.saturating_sub(2), 2) {
                    text += &format!("{indent}{line}\n");
                }
            }
            text
        };
        let rows: Vec<String> = self.rows.iter().map(show).collect();
        rows.join("\n").trim_end().to_owned()
    }

    /// The table in Markdown, in which nothing wraps.
    pub fn markdown(&self) -> String {
        let columns = 0..self.headings.len();
        let widths: Vec<usize> = columns.map(|column| self.most(column)).collect();
        self.draw(&MARKDOWN, &widths)
    }

    /// The minimum width of a column.
    fn least(&self, column: usize) -> usize {
        let words = |text: &str| {
            let words = text.split('\n').flat_map(|line| {
                let indent = line.len() - line.trim_start_matches(' ').len();
                line.split_whitespace()
                    .map(move |word| indent + word.width())
            });
            words.max().unwrap_or(0).min(WORD)
        };
        let cells = self.rows.iter().map(|row| &row[column]);
        let cells = cells.map(|cell| match self.whole.contains(&column) {
            true => longest_line(cell),
            false => words(cell),
        });
        cells.max().unwrap_or(0).max(words(&self.headings[column]))
    }

    /// The maximum width that a column can use.
    fn most(&self, column: usize) -> usize {
        longest_line(&self.headings[column]).max(self.longest_cell(column))
    }

    fn longest_cell(&self, column: usize) -> usize {
        let cells = self.rows.iter().map(|row| longest_line(&row[column]));
        cells.max().unwrap_or(0)
    }

    fn draw(&self, frame: &Frame, widths: &[usize]) -> String {
        let wrap_row = |row: &Vec<String>| -> Vec<Vec<String>> {
            let cells = row.iter().zip(widths);
            cells.map(|(cell, width)| wrap(cell, *width)).collect()
        };
        let mut rows: Vec<Vec<Vec<String>>> = vec![wrap_row(&self.headings)];
        rows.extend(self.rows.iter().map(wrap_row));
        // Wrapping leaves room at the end of lines, so a column needs only the width of its
        // longest line.
        let widths: Vec<usize> = (0..widths.len())
            .map(|column| {
                let lines = rows.iter().flat_map(|row| &row[column]);
                lines.map(|line| line.width()).max().unwrap_or(0)
            })
            .collect();
        let mut text = Vec::new();
        for (number, row) in rows.iter().enumerate() {
            let height = row.iter().map(Vec::len).max().unwrap_or(0);
            for line in 0..height {
                let cells: Vec<String> = row
                    .iter()
                    .zip(&widths)
                    .map(|(cell, width)| {
                        let cell = cell.get(line).map_or("", String::as_str);
                        format!("{cell}{}", " ".repeat(width - cell.width()))
                    })
                    .collect();
                let line = cells.join(frame.between);
                let line = format!("{}{line}{}", frame.left, frame.right);
                text.push(line.trim_end().to_owned());
            }
            if number == 0 {
                let (left, between, right, fill) = frame.rule;
                let rules: Vec<String> = widths.iter().map(|width| fill.repeat(*width)).collect();
                text.push(format!("{left}{}{right}", rules.join(between)));
            }
        }
        text.join("\n")
    }
}

/// The first form that fits as a table. If none fits, the first form as a list, which has the
/// most text.
pub fn first_that_fits<const N: usize>(forms: [Table; N], width: usize) -> String {
    let fitting = forms.iter().find_map(|form| form.fit(width));
    fitting.unwrap_or_else(|| forms[0].list(width))
}

/// Numbered details for which a table has no room. Each appears once.
#[derive(Debug, Default)]
pub struct Notes(Vec<String>);

impl Notes {
    /// The number of a detail, in brackets.
    pub fn number(&mut self, note: impl Into<String>) -> String {
        let note = note.into();
        let known = self.0.iter().position(|known| *known == note);
        let number = known.unwrap_or_else(|| {
            self.0.push(note);
            self.0.len() - 1
        });
        format!("[{}]", number + 1)
    }

    /// Each detail with its number, wrapped.
    pub fn show(&self, width: usize) -> String {
        self.numbered()
            .map(|note| paragraph(&note, width))
            .collect()
    }

    /// The details as list items of Markdown, one line each.
    pub fn markdown(&self) -> String {
        self.numbered().map(|note| format!("- {note}\n")).collect()
    }

    fn numbered(&self) -> impl Iterator<Item = String> {
        let notes = self.0.iter().enumerate();
        notes.map(|(number, note)| format!("[{}] {note}", number + 1))
    }
}

/// A text wrapped to this width, with a hanging indent.
pub fn paragraph(text: &str, width: usize) -> String {
    let lines = wrap_hanging(text, width, 4);
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// A text beside its label. Further lines are aligned with the text.
pub fn labelled(label: &str, text: &str, width: usize) -> String {
    let indent = label.width().min(width / 2);
    let lines = wrap_hanging(text, width.saturating_sub(indent + 1), 0);
    let before = |number: usize| {
        if number == 0 {
            label.to_owned()
        } else {
            " ".repeat(indent)
        }
    };
    let lines = lines.iter().enumerate();
    lines
        .map(|(number, line)| format!("{} {line}\n", before(number)))
        .collect()
}

/// A missing requirement of the machine, with the remedy below it.
pub fn missing(what: &str, remedy: &str, width: usize) -> String {
    let mut text = paragraph(&format!("missing: {what}"), width);
    if !remedy.is_empty() {
        text += &paragraph(&format!("    {remedy}"), width);
    }
    text
}

/// The lines of a text, none wider than `width`. A wrapped line keeps its indentation.
fn wrap(text: &str, width: usize) -> Vec<String> {
    wrap_hanging(text, width, 0)
}

/// Like [`wrap`], with a hanging indent of `hang`.
pub fn wrap_hanging(text: &str, width: usize, hang: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.split('\n') {
        let own = line.len() - line.trim_start_matches(' ').len();
        let hang = |lines: &Vec<String>| if lines.is_empty() { 0 } else { hang };
        // Room for at least one wide letter remains.
        let indent = |lines: &Vec<String>| (own + hang(lines)).min(width.saturating_sub(2));
        let mut current = " ".repeat(indent(&lines));
        let mut is_empty = true;
        for mut word in line.split_whitespace() {
            if !is_empty && current.width() + 1 + word.width() > width {
                lines.push(std::mem::take(&mut current));
                current = " ".repeat(indent(&lines));
                is_empty = true;
            }
            while is_empty && current.width() + word.width() > width {
                let (head, tail) = split_at(word, width.saturating_sub(current.width()));
                lines.push(current + head);
                current = " ".repeat(indent(&lines));
                word = tail;
            }
            if !is_empty {
                current.push(' ');
            }
            current += word;
            is_empty = word.is_empty();
        }
        lines.push(current);
    }
    lines
}

/// Splits a word into the letters that fit, at least one, and the rest.
fn split_at(word: &str, room: usize) -> (&str, &str) {
    let mut used = 0;
    let too_far = word.char_indices().skip(1).find(|(at, letter)| {
        if used == 0 {
            used = word[..*at].width();
        }
        used += letter.width().unwrap_or(1);
        used > room
    });
    word.split_at(too_far.map_or(word.len(), |(at, _)| at))
}

fn longest_line(text: &str) -> usize {
    let lines = text.split('\n').map(|line| line.width());
    lines.max().unwrap_or(0)
}

/// Checks shared by the tests of each table.
#[cfg(test)]
pub mod check {
    use super::*;

    /// Panics if a line is too wide or ends in blanks.
    pub fn fits(text: &str, width: usize) {
        for line in text.lines() {
            let wide = line.width();
            assert!(
                wide <= width,
                "{wide} columns, not {width}:\n{line}\n{text}"
            );
            assert_eq!(line, line.trim_end(), "blanks at the end of {line:?}");
        }
    }

    /// Panics if the text does not contain `words`, which may be wrapped anywhere.
    pub fn tells(text: &str, words: &str) {
        let joined = |text: &str| text.split_whitespace().collect::<String>();
        let is_there = joined(text).contains(&joined(words));
        assert!(is_there, "no {words:?} in\n{text}");
    }

    /// Panics if one of these words is missing. A cell of a table may have them in several
    /// lines, with other cells between them.
    pub fn names(text: &str, words: &str) {
        words.split_whitespace().for_each(|word| tells(text, word));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_width_is_the_terminals_or_else_that_of_columns_and_never_more_than_100() {
        assert_eq!(usable(Some(80), Some("90")), 80);
        assert_eq!(usable(Some(250), None), 100);
        // A serial console.
        assert_eq!(usable(Some(0), Some("90")), 90);
        assert_eq!(usable(None, Some("90")), 90);
        assert_eq!(usable(None, Some("1000")), 100);
        for useless in [None, Some(""), Some("0"), Some("-1"), Some("wide")] {
            assert_eq!(usable(None, useless), 100, "{useless:?}");
        }
        assert_eq!(usable(Some(3), None), LEAST);
    }

    #[test]
    fn text_wraps_between_words_and_keeps_its_indentation() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("a\n  b c d", 5), ["a", "  b c", "  d"]);
        assert_eq!(wrap("", 5), [""]);
        assert_eq!(wrap("peer-to-peer [1]", 12), ["peer-to-peer", "[1]"]);
    }

    #[test]
    fn a_word_breaks_only_where_it_is_longer_than_a_line() {
        assert_eq!(wrap("a /mnt/nvme/file", 6), ["a", "/mnt/n", "vme/fi", "le"]);
        // Letters of width two, which must not be split.
        assert_eq!(wrap("メモリ", 5), ["メモ", "リ"]);
        assert_eq!(wrap("メ", 0)[0], "メ");
        assert_eq!(wrap("   メモ", 2), ["メ", "モ"]);
    }

    #[test]
    fn a_paragraphs_further_lines_are_indented() {
        let text = "[1] one two\n    three\n    four\n";
        assert_eq!(paragraph("[1] one two three four", 11), text);
    }

    fn some() -> Table {
        let mut table = Table::new(["from", "path used", "bytes"]);
        table.row(["first file", "peer-to-peer", "8 MiB"]);
        table.row(["a buffer", "staged-copy\n  proof-failed [1]", "1000003"]);
        table
    }

    #[test]
    fn a_table_is_no_wider_than_it_needs() {
        let table = "\
from       ┆ path used          ┆ bytes
═══════════╪════════════════════╪════════
first file ┆ peer-to-peer       ┆ 8 MiB
a buffer   ┆ staged-copy        ┆ 1000003
           ┆   proof-failed [1] ┆";
        assert_eq!(some().show(100), table);
        assert_eq!(some().show(41), table);
    }

    #[test]
    fn columns_wrap_as_far_as_their_longest_words() {
        let table = "\
from     ┆ path used      ┆ bytes
═════════╪════════════════╪════════
first    ┆ peer-to-peer   ┆ 8 MiB
file     ┆                ┆
a buffer ┆ staged-copy    ┆ 1000003
         ┆   proof-failed ┆
         ┆   [1]          ┆";
        assert_eq!(some().fit(35).unwrap(), table);
        assert!(some().whole(1).fit(35).is_none());
    }

    #[test]
    fn without_room_for_a_table_there_is_a_list() {
        let list = "\
from: first file
  path used: peer-to-peer
  bytes: 8 MiB

from: a buffer
  path used: staged-copy
      proof-failed [1]
  bytes: 1000003";
        assert_eq!(some().show(28), list);
    }

    #[test]
    fn pieces_have_the_first_column_each_and_all_others_once() {
        let mut table = Table::new(["", "CPU", "file", "iommufd"]).whole(3);
        table.row(["memfd", "shared", "staged", "no [1]"]);
        let pieces = [
            "      ┆ CPU    ┆ file",
            "══════╪════════╪═══════",
            "memfd ┆ shared ┆ staged",
            "",
            "      ┆ iommufd",
            "══════╪════════",
            "memfd ┆ no [1]",
        ];
        assert_eq!(table.pieces(25).unwrap(), pieces.join("\n"));
        assert_eq!(table.pieces(100), table.fit(100));
        assert_eq!(table.pieces(10), None);
        assert_eq!(Table::new(["alone"]).pieces(10).unwrap(), "alone\n═════");
    }

    #[test]
    fn nothing_is_lost_at_any_width() {
        let mut table = Table::new(["", "a heading of words", "メモリ"]);
        table.row(["/a/path/that/is/longer/than/any/column", "", "メモリメモリ"]);
        table.row(["short"; 3]);
        for width in LEAST..=MOST {
            for text in [table.show(width), table.pieces(width).unwrap_or_default()] {
                check::fits(&text, width);
            }
        }
        check::tells(&table.list(LEAST), "/a/path/that/is/longer/than/any/column");
    }

    #[test]
    fn a_note_is_told_once() {
        let mut notes = Notes::default();
        assert_eq!(notes.number("first"), "[1]");
        assert_eq!(notes.number("second"), "[2]");
        assert_eq!(notes.number("first"), "[1]");
        assert_eq!(notes.show(80), "[1] first\n[2] second\n");
        assert_eq!(notes.markdown(), "- [1] first\n- [2] second\n");
    }
}
