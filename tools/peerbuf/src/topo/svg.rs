//! The tree and the matrix as a picture.

use std::fmt::Write;

use peerbuf_topo::Rules;
use peerbuf_topo::machine::Index;

use super::matrix::{near, word};
use super::tree::Line;

const ROW: usize = 20;
const STEP: usize = 18;
const MARGIN: usize = 16;
/// The approximate width of a letter.
const LETTER: usize = 7;
const CELL: usize = 46;

/// Colours that also differ in brightness. Each cell contains its word.
fn colour(word: &str) -> &'static str {
    match word {
        "bus" => "#9ad1a8",
        "host" => "#cfe3a0",
        "yes" => "#dbe9c8",
        "no" => "#e59a8f",
        "?" => "#e3e3e3",
        _ => "#f5f5f5",
    }
}

const LEGEND: [&str; 2] = [
    "below the X: what the kernel will say (bus: by bus addresses, host: through the host bridge)",
    "above it: nvidia-smi's words",
];

/// Draws the picture, without the matrix for more than `most` devices.
pub fn draw(rules: &Rules<'_>, lines: &[Line], labels: &[(Index, String)], most: usize) -> String {
    let labels = if labels.len() > most { &[] } else { labels };
    let machine = rules.machine();
    let address = |line: &Line| {
        line.function
            .map(|index| machine.function(index).address.to_string())
    };
    let texts: Vec<String> = lines
        .iter()
        .map(|line| match (address(line), &line.label) {
            (Some(at), Some(label)) => format!("{label}  {at} {}", line.text),
            (Some(at), None) => format!("{at} {}", line.text),
            (None, _) => line.text.clone(),
        })
        .collect();
    let tree_width = lines
        .iter()
        .zip(&texts)
        .map(|(line, text)| line.depth * STEP + text.chars().count() * LETTER);
    let legend = LEGEND.iter().filter(|_| !labels.is_empty());
    let legend_width = legend.clone().map(|words| words.len() * LETTER).max();
    let matrix_top = 2 * MARGIN + lines.len() * ROW;
    let width = tree_width
        .max()
        .unwrap_or(0)
        .max((labels.len() + 1) * CELL)
        .max(legend_width.unwrap_or(0))
        + 2 * MARGIN;
    let height = matrix_top + (labels.len() + 4) * ROW + MARGIN;
    let mut svg = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"monospace\" font-size=\"11\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>"
    );
    let middle = |row: usize| MARGIN + row * ROW + ROW / 2;
    for (row, (line, text)) in lines.iter().zip(&texts).enumerate() {
        let (x, y) = (MARGIN + line.depth * STEP, middle(row));
        if line.depth > 0 {
            // The line to the entry above that this entry hangs from.
            let above = lines[..row]
                .iter()
                .rposition(|above| above.depth < line.depth)
                .unwrap_or(0);
            let rail = x - STEP + 5;
            let _ = writeln!(
                svg,
                "<path d=\"M{rail} {} V{y} H{}\" stroke=\"#777777\" fill=\"none\"/>",
                middle(above) + 6,
                x - 2
            );
        }
        if line.label.is_some() {
            let _ = writeln!(
                svg,
                "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" rx=\"3\" fill=\"#dce8f7\"/>",
                x - 1,
                y - 8,
                text.chars().count() * LETTER + 4,
                ROW - 4
            );
        }
        let weight = if line.function.is_none() {
            " font-weight=\"bold\""
        } else {
            ""
        };
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\"{weight}>{}</text>",
            x + 1,
            y + 4,
            escape(text)
        );
    }
    let text = |svg: &mut String, x: usize, row: usize, text: &str| {
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x + CELL / 2,
            matrix_top + row * ROW + 14,
            escape(text)
        );
    };
    for (column, (_, label)) in labels.iter().enumerate() {
        text(&mut svg, MARGIN + (column + 1) * CELL, 0, label);
    }
    for (row, (one, label)) in labels.iter().enumerate() {
        text(&mut svg, MARGIN, row + 1, label);
        for (column, (other, _)) in labels.iter().enumerate() {
            let route = rules.route(*one, *other);
            let (content, fill) = match row.cmp(&column) {
                std::cmp::Ordering::Equal => ("X", "#f5f5f5"),
                std::cmp::Ordering::Greater => (word(route.possible), colour(word(route.possible))),
                std::cmp::Ordering::Less => (near(&route), colour(near(&route))),
            };
            let x = MARGIN + (column + 1) * CELL;
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{}\" width=\"{CELL}\" height=\"{ROW}\" fill=\"{fill}\" stroke=\"#ffffff\"/>",
                matrix_top + (row + 1) * ROW
            );
            text(&mut svg, x, row + 1, content);
        }
    }
    for (line, words) in legend.enumerate() {
        let y = matrix_top + (labels.len() + 2 + line) * ROW;
        let _ = writeln!(
            svg,
            "<text x=\"{MARGIN}\" y=\"{y}\" fill=\"#555555\">{}</text>",
            escape(words)
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// Escapes a name, which may come from another user's file.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML has no other control characters.
            letter if letter.is_control() => escaped.push('\u{fffd}'),
            letter => escaped.push(letter),
        }
    }
    escaped
}
