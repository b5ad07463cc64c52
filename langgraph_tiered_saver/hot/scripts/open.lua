-- Let a shard enter a generation that it was prepared for, unless it is in a later one.
-- KEYS: shard
-- ARGV: generation, who prepared it
-- Returns the generation that it is in now.
--
-- A server that was emptied since is not prepared any more: otherwise a process that is late would make it pass for
-- what it was when another one opened the generation. Nor is one that somebody else has opened.
local known = redis.call('HGET', KEYS[1], 'g')
if known and tonumber(known) > tonumber(ARGV[1]) then return known end
local mark = 'o:' .. ARGV[2]
if redis.call('HGET', KEYS[1], mark) ~= ARGV[1] then
  return redis.error_reply('TIEREDGENERATION it was emptied, or opened by another process, after it was prepared')
end
-- This one stays, so that it may run twice.
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.sub(name, 1, 2) == 'o:' and name ~= mark then redis.call('HDEL', KEYS[1], name) end
end
redis.call('HSET', KEYS[1], 'g', ARGV[1])
return ARGV[1]
