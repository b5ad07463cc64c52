-- Keep what the cold tier knows of the hot checkpoint's history, of channels of which nothing is known here, if the
-- lease still stands.
-- KEYS: hot hash, shard
-- ARGV: token, generation, checkpoint, its last record's sequence number ('' = it was warmed), for each channel
--       {channel, version, '1' = it has a seed, seed, numbers, the fields' values...} (framed)
-- Returns 1 if the lease stood, else 0.
local hot, history = KEYS[1], histories()
local known = redis.call('HMGET', hot, 'l', 'g', 'id', 'q', 'h')
if known[1] ~= ARGV[1] or known[2] ~= ARGV[2] or known[3] ~= ARGV[3] or (known[4] or '') ~= ARGV[4]
    or redis.call('HGET', KEYS[2], 'g') ~= ARGV[2] then return 0 end
local old, new, at = known[5] and unframe(known[5]) or {}, {}, {}
local fields, stale = {}, {}
if old[1] == ARGV[3] then
  new = old
  for i = 3, #old, 5 do at[old[i]] = i end
else
  for i = 3, #old, 5 do history.drop(hot, old, i, stale) end
  new = {ARGV[3], ''}
end
for i = 5, #ARGV do
  local given = unframe(ARGV[i])
  local channel = given[1]
  local entry = at[channel] or #new + 1
  if (not at[channel] or old[entry + 1] == '') and redis.call('HEXISTS', hot, 'v:' .. channel) == 0 then
    if at[channel] then history.drop(hot, old, entry, stale) end
    for n, part in ipairs({channel, 'H', given[2], given[3], given[5]}) do new[entry + n - 1] = part end
    if given[3] == '1' then
      stale[#stale + 1] = 'd:' .. channel
      fields[#fields + 1], fields[#fields + 2] = 'b:' .. channel, given[4]
    end
    for n = 6, #given do fields[#fields + 1], fields[#fields + 2] = 'h:' .. channel .. '\0' .. (n - 5), given[n] end
  end
end
stale[#stale + 1] = 'l'
in_chunks('HDEL', hot, stale)
fields[#fields + 1], fields[#fields + 2] = 'h', history.frame(new)
in_chunks('HSET', hot, fields)
return 1
