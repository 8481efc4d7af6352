//! Distribution of vectors over calls of a micro kernel.

/// Calls a micro kernel with the number of vectors as a compile-time constant.
macro_rules! with_constant {
    ($count:expr, $level:ident :: $kernel:ident, [$($constant:literal)+], $arguments:tt) => {
        match $count {
            $($constant => $level::$kernel::<$constant> $arguments,)+
            count => unreachable!("no micro kernel for {count} vectors"),
        }
    };
}
pub(in crate::kernels) use with_constant;

/// Divides `rank` vectors into as few and as even tiles as possible: at most `first` in the first, at most `most` in
/// the others. Returns the (start, count) of each.
pub(in crate::kernels) fn tiles(
    rank: usize,
    first: usize,
    most: usize,
) -> impl Iterator<Item = (usize, usize)> + Clone {
    let others = rank.saturating_sub(first).div_ceil(most);
    let first = first.min(rank.div_ceil(others + 1));
    let rest = rank - first;
    let edge = move |tile: usize| match tile {
        0 => 0,
        _ if others == 0 => first,
        _ => first + (tile - 1) * (rest / others) + (tile - 1).min(rest % others),
    };
    (0..=others).map(move |tile| (edge(tile), edge(tile + 1) - edge(tile)))
}

#[cfg(test)]
mod tests {
    use super::tiles;

    #[test]
    fn tiles_cover_every_vector_once() {
        for (first, most) in [(4, 6), (1, 3)] {
            for rank in 1..700 {
                let mut next = 0;
                for (index, (start, count)) in tiles(rank, first, most).enumerate() {
                    assert_eq!(start, next);
                    assert!((1..=if index == 0 { first } else { most }).contains(&count), "{count} of {rank}");
                    next += count;
                }
                assert_eq!(next, rank);
            }
        }
    }
}
