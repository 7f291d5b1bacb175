//! The picture of a machine in SVG 1.1. It has a background of its own, so that it reads the same in a light page and a dark one.

use std::fmt::Write;

use super::picture::{CHIP_HEIGHT, CHIP_WIDTH, Chip, Frame, INSET, LABEL, Picture, fitting};
use super::report::Report;

/// Colours of ways, used in turn; each is readable on white.
const COLOURS: [&str; 8] =
    ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#7d4e00", "#0e7490", "#cf222e"];
/// Fills of frames by depth.
const FILLS: [&str; 3] = ["#ffffff", "#eef1f4", "#ffffff"];
const STYLE: &str = "\
text{font-family:Helvetica,Arial,'Liberation Sans',sans-serif;font-size:12px;fill:#1f2328}\
.detail,.label{fill:#57606a}.detail{font-size:11px}.name{font-weight:bold}\
.frame{stroke:#c4ccd4}.chip{fill:#fff;stroke:#6e7781;stroke-width:1.5}\
.unused .chip{fill:#f6f8fa;stroke:#8c959f;stroke-dasharray:4 3}.unused text{fill:#57606a}\
.use{fill:none;stroke-width:2;stroke-linejoin:round}\
.label{paint-order:stroke;stroke:#fff;stroke-width:4px}";
/// From a box's edge to its text.
const TEXT_INSET: usize = 8;

impl Report<'_> {
    /// The machine as a picture, and which devices each accelerator uses.
    ///
    /// Elements say in `data-` attributes what they stand for: `g` of class `accelerator` or `network` with `data-id`,
    /// the PCI address (a name where there is none); `path` of class `use` with `data-from` and `data-to`.
    pub fn svg(&self) -> String {
        let picture = Picture::new(self);
        let (width, height) = (picture.width, picture.height);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" role=\"img\">\n<title>{}</title>\n<style>{STYLE}</style>\n\
             <rect width=\"{width}\" height=\"{height}\" rx=\"6\" fill=\"#f6f8fa\"/>\n",
            Escaped(&self.counts())
        );
        for frame in &picture.frames {
            write_frame(&mut out, frame, width);
        }
        write_uses(&mut out, &picture);
        for frame in &picture.frames {
            let (class, x) = (if frame.depth == 0 { "name" } else { "label" }, frame.inset() + TEXT_INSET);
            write_text(&mut out, class, x, frame.y + 14, &frame.label, width - 2 * x);
        }
        for chip in picture.accelerators() {
            write_chip(&mut out, chip, "accelerator");
        }
        for chip in picture.networks() {
            write_chip(&mut out, chip, if chip.rails.is_empty() { "network unused" } else { "network" });
        }
        for (line, note) in picture.notes.iter().enumerate() {
            let y = picture.notes_y + LABEL * line;
            write_text(&mut out, "label", INSET + TEXT_INSET, y + 14, note, width - 2 * (INSET + TEXT_INSET));
        }
        out.push_str("</svg>\n");
        out
    }
}

fn write_frame(out: &mut String, frame: &Frame, width: usize) {
    let (x, y, height) = (frame.inset(), frame.y, frame.height);
    let (width, fill) = (width - 2 * x, FILLS[frame.depth.min(FILLS.len() - 1)]);
    let _ = writeln!(
        out,
        "<rect class=\"frame\" x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" rx=\"5\" fill=\"{fill}\"/>"
    );
}

fn write_uses(out: &mut String, picture: &Picture) {
    for chip in picture.accelerators() {
        for end in picture.ends.iter().filter(|end| chip.way == Some(end.way)) {
            let _ = writeln!(
                out,
                "<path class=\"use\" data-from=\"{}\" data-to=\"{}\" stroke=\"{}\" d=\"M{} {}H{}V{}H{}V{}\"/>",
                Escaped(&chip.id),
                Escaped(&end.network),
                colour(end.way),
                chip.x + CHIP_WIDTH,
                chip.y + CHIP_HEIGHT / 2,
                picture.ways[end.way].channel_x,
                end.lane_y,
                end.x,
                end.y,
            );
        }
    }
}

fn write_chip(out: &mut String, chip: &Chip, class: &str) {
    let (x, y) = (chip.x, chip.y);
    let stroke = chip.way.map(|way| format!(" style=\"stroke:{}\"", colour(way))).unwrap_or_default();
    let _ = writeln!(
        out,
        "<g class=\"{class}\" data-id=\"{}\"><title>{}</title>\n\
         <rect class=\"chip\" x=\"{x}\" y=\"{y}\" width=\"{CHIP_WIDTH}\" height=\"{CHIP_HEIGHT}\" rx=\"4\"{stroke}/>",
        Escaped(&chip.id),
        Escaped(&chip.title)
    );
    let room = CHIP_WIDTH - 2 * TEXT_INSET;
    write_text(out, "name", x + TEXT_INSET, y + 15, &chip.name, room);
    write_text(out, "detail", x + TEXT_INSET, y + 29, &chip.detail, room);
    out.push_str("</g>\n");
}

fn write_text(out: &mut String, class: &str, x: usize, y: usize, text: &str, room: usize) {
    let text = fitting(text, class == "detail", room);
    let _ = writeln!(out, "<text class=\"{class}\" x=\"{x}\" y=\"{y}\">{}</text>", Escaped(&text));
}

fn colour(way: usize) -> &'static str {
    COLOURS[way % COLOURS.len()]
}

/// Text as XML wants it. Names come from files that somebody wrote: what XML 1.0 has no character for is replaced.
struct Escaped<'a>(&'a str);

impl std::fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\0'..'\u{20}' | '\u{fffe}' | '\u{ffff}' => f.write_str("\u{fffd}")?,
                c => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Escaped;

    #[test]
    fn text_is_written_as_xml_wants_it() {
        assert_eq!(
            Escaped("<a & \"b\">\0\u{ffff}\u{e9}").to_string(),
            "&lt;a &amp; &quot;b&quot;&gt;\u{fffd}\u{fffd}\u{e9}"
        );
    }
}
